"""What a document is to those that keep documents apart."""

from trainer.specs.base import require, spec


@spec
class Documents:
    """Documents on their own: context never crosses the `bos` token that opens one."""

    bos: int = 1

    def __post_init__(self) -> None:
        require(self.bos >= 0, f"bos={self.bos} is below 0")
