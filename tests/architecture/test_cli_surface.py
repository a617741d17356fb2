"""The command line as users know it: verbs, arguments, flags and exit codes."""

from collections.abc import Iterator
from typing import Any

import typer.main

from service.cli import app
from trainer import errors

SURFACE = """\
audit SUBJECT --liveness --profile --probe/--no-probe --limit -S --home -o/--output
baseline list -o/--output
baseline measure [SWEEP] --home -o/--output
baseline plan SUBJECT --gain-nats --mode --min-gain-nats --alpha --power --paired --gpu-seconds \
--usd-per-gpu-hour --home -o/--output
baseline show BASELINE -o/--output
best [SWEEP] --home --server --token -o/--output
cancel SWEEP --server --token -o/--output
compare SIDES --home --server --token -o/--output
data fetch [VARIANT] --train-shards --holdout/--no-holdout --name --base-url --repo --home
data ls --home -o/--output
data prepare [SOURCES] --name --embedded --tokenizer --vocab-size --val-fraction \
--holdout-fraction --shard-tokens --seed --home
data verify NAME --home
doctor [SWEEP_FILE] -S --verify --home --address -o/--output
export FINAL -o/--out --author --github --name --blurb --date --seeds --home --output
fit BANK --cap -S --entry --recipe --data --train-tokens --tokens --tokenizer --limit --window \
--stride --variant --dtype --out --home -o/--output
gate SUBJECT --against --mode --min-gain-nats --alpha --home -o/--output
import FILE -o/--out --recipe -S --tokens
logs SWEEP -f/--follow --source --server --token
ls --state --owner --name --limit --server --token -o/--output
pause SWEEP --server --token -o/--output
plan SWEEP_FILE -S --step-seconds --home -o/--output
quantize BANK -o/--out -S --entry --recipe --data --train-tokens --tokenizer --dtype --home \
--output
quota ls --home --database-url -o/--output
quota set USER --gangs --gpu-hours --max-priority --window-days --home --database-url
recipes [NAME] -o/--output
replay RUN --data --allow -S --keep --tracking-uri --home -o/--output
report [SWEEP] --home --server --token -o/--output --open
resume SWEEP --server --token -o/--output
run SWEEP_FILE -S --home --num-cpus --address --tracking-uri --no-tracking --expect -o/--output
schema [OF]
score CHECKPOINT --data --tokens --tokenizer --limit --window --stride --variant --documents -S \
--recipe --entry --dtype --workers --budget-seconds --home -o/--output
serve --home --host --port --database-url --cluster --gangs --num-cpus --tracking-uri --root \
--allowed-host --webhook --webhook-secret-file --requests-per-second
status [SWEEP] --watch --home --server --token -o/--output
stop SWEEP --server --token -o/--output
submit SWEEP_FILE -S --priority --key --dry-run --wait --server --token -o/--output
sync [SWEEP] --home --tracking-uri
token create USER --role --days --note --home --database-url
token ls --home --database-url -o/--output
token revoke TOKEN_ID --home --database-url
validate SWEEP_FILE -S --home -o/--output
verify RECORD --data --trust --home -o/--output
""".splitlines()

EXIT_CODES = {
    "FairwayError": 1,
    "TrainingError": 1,
    "OutOfMemory": 1,
    "Stopped": 1,
    "UsageError": 2,
    "DataError": 2,
    "InfeasibleError": 3,
    "BudgetError": 4,
    "BackendError": 5,
}


def test_verbs_and_flags_are_those_that_users_know() -> None:
    shown = sorted(_lines(typer.main.get_command(app), []))

    assert shown == SURFACE, (
        "the command line changed; if that is meant, change SURFACE, README and CHANGELOG with it"
    )


def test_every_verb_says_what_it_does() -> None:
    silent = [path for path, verb in _verbs(typer.main.get_command(app), []) if not verb.help]

    assert not silent, f"write a docstring for the verb: {silent}"


def test_exit_codes_are_those_that_scripts_know() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]

    codes = {cls.__name__: cls.exit_code for cls in classes if hasattr(cls, "exit_code")}

    assert codes == EXIT_CODES, (
        "an exit code changed; if that is meant, change EXIT_CODES, README and CHANGELOG with it"
    )


def _verbs(command: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name, inner in command.commands.items():
        yield from _verbs(inner, [*path, name])


def _lines(command: Any, path: list[str]) -> Iterator[str]:
    for name, verb in _verbs(command, path):
        yield " ".join([name, *(_shown(parameter) for parameter in verb.params)])


def _shown(parameter: Any) -> str:
    """NAME or [NAME] for an argument; every spelling of an option."""
    if parameter.param_type_name == "argument":
        name = parameter.name.upper()
        return name if parameter.required else f"[{name}]"
    return "/".join([*parameter.opts, *parameter.secondary_opts])
