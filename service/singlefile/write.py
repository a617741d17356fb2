"""Write a final's recipe as one file: readable, and packed as it is counted."""

import base64
import lzma
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from service.singlefile.cut import Cut
from trainer.finalize.code import minify
from trainer.runtime.files import write_text
from trainer.specs.task import FinalTask, TrainTask
from trainer.specs.train import ema_entry

CODE_FILE: Final = "train_gpt.py"
SOURCE_FOLDER: Final = "source"
# Compilers of kernels read sources from files, so nothing is imported from memory.
_PACKED: Final = """\
import atexit,base64,importlib,lzma,pathlib,shutil,sys,tempfile
if __name__=="__main__":
 top=tempfile.mkdtemp()
 atexit.register(shutil.rmtree,top,True)
 pathlib.Path(top,"train_gpt_source.py").write_bytes(lzma.decompress(base64.b85decode("{}")))
 sys.path.insert(0,top)
 raise SystemExit(importlib.import_module("train_gpt_source").main())
"""


@dataclass(frozen=True, slots=True)
class SingleFile:
    """What was written: the packed file, which is what counts, and the source that it holds.

    `packages` are those that it needs beside the standard library.
    """

    path: Path
    source_path: Path
    num_bytes: int
    packages: tuple[str, ...]


def write_single_file(
    train: TrainTask, final: FinalTask, folder: Path, world_size: int
) -> SingleFile:
    """Write `train_gpt.py` and `source/train_gpt.py` into `folder`.

    The file trains what the tasks say from step 0, finalizes it and scores what it wrote; by
    another number of workers than `world_size` it trains only if it is told that it may. On a CPU
    it leaves the bytes that the trainer leaves. Equal tasks and sources give equal bytes with one
    version of liblzma. ExportError if the trainer's sources cannot be cut so.
    """
    cut = Cut(_alone(train, final), final, world_size)
    source = cut.text()
    source_path, path = folder / SOURCE_FOLDER / CODE_FILE, folder / CODE_FILE
    write_text(source_path, source)
    packed = pack(source)
    write_text(path, packed)
    return SingleFile(path, source_path, len(packed.encode()), cut.packages)


def pack(source: str) -> str:
    """Return a file that unpacks a source, minified, beside nothing else and runs it."""
    squeezed = lzma.compress(minify(source).encode(), preset=9 | lzma.PRESET_EXTREME)
    return _PACKED.format(base64.b85encode(squeezed).decode())


def _alone(train: TrainTask, final: FinalTask) -> TrainTask:
    """The training that leaves this one final's entry: no other average, nothing to go on from.

    Averages and what is observed change no weight.
    """
    averages = train.train.averages
    wanted = tuple(d for d in averages.decays() if ema_entry(d) == final.entry)
    swa = averages.swa if final.entry == "swa" else None
    kept = replace(averages, ema_decay=None, ema_bank=wanted, swa=swa)
    observe = replace(train.observe, checkpoint_every=None, forecast=None)
    return replace(train, train=replace(train.train, averages=kept), observe=observe)
