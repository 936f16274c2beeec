"""Prompt files: .txt, .csv, .tsv and .jsonl."""

import csv
import json
import sys
from pathlib import Path

from utils.runs import InputError

SHAPES = Path(__file__).resolve().parent.parent / "shapes"
TRAIN_PROMPTS, EVAL_PROMPTS = str(SHAPES / "prompts_train.txt"), str(SHAPES / "prompts_eval.txt")
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")


class Prompt(str):
    """A prompt. metadata: its row of the prompt file, {column: value}; of a .txt file {}."""

    def __new__(cls, text: str, metadata: dict | None = None):
        prompt = super().__new__(cls, text)
        prompt.metadata = metadata or {}
        return prompt


def read_prompt_sets(file: str, eval_file: str) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts) of --prompts and --eval_prompts. If that is left out, every tenth
    prompt of --prompts is held out; TRAIN_PROMPTS goes with EVAL_PROMPTS. InputError for a bad file or too
    few prompts."""
    prompts = read_prompts(file, "--prompts")
    if len(prompt_files(file, eval_file)) > 1:
        held_out = read_prompts(eval_file or EVAL_PROMPTS, "--eval_prompts")
    else:
        prompts, held_out = [p for i, p in enumerate(prompts) if i % 10], prompts[::10]
    if not prompts or len(held_out) < 2:
        flag = f"--eval_prompts {eval_file}" if eval_file else f"--prompts {file}"
        raise InputError(f"{flag}: too few to hold out two for evaluation; add more or give --eval_prompts")
    warn_of_overlap(prompts, held_out)
    return prompts, held_out


def prompt_files(file: str, eval_file: str) -> list[str]:
    """The files that read_prompt_sets reads."""
    eval_file = eval_file or (EVAL_PROMPTS if file == TRAIN_PROMPTS else "")
    return [split_column(name)[0] for name in (file, eval_file) if name]


def read_prompts(file: str, flag: str) -> list[Prompt]:
    """The prompts of a file, in order, with their metadata. InputError, naming `flag`, if there are none.

    A .txt file has one prompt a line. A .csv, .tsv or .jsonl file has a column, given as file.csv:column;
    left out, it is the first of PROMPT_COLUMNS there is, in any case. A .tsv file has no quoting: in
    PartiPrompts.tsv a quotation mark at the start belongs to the prompt.
    """
    name, column = split_column(file)
    path, suffix = Path(name), Path(name).suffix
    if suffix not in (".txt", ".csv", ".tsv", ".jsonl"):
        raise InputError(
            f"{flag} {file}: give a .txt file (one prompt a line), or .csv, .tsv or .jsonl with a column "
            "`prompt`"
        )
    if not path.is_file():
        raise InputError(f"{flag} {file}: no such file; give the path of one")
    lines = []
    for number, line in enumerate(
        path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), 1
    ):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{flag} {file}: line {number} is not UTF-8; save the file as UTF-8") from None
    rows = []
    if suffix == ".txt":
        prompts, rows = lines, [{} for _ in lines]
    elif suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    column = column or choose_column(row.keys())
                    prompts.append(row[column] + "")
                    rows.append(row)
                except (ValueError, KeyError, TypeError, AttributeError):
                    example = f'{{"{column or "prompt"}": "..."}}'
                    raise InputError(f"{flag} {file}: line {number} is not {example}") from None
    else:
        columns, rows = read_table(lines, suffix, f"{flag} {file}")
        chosen = column or choose_column(columns)
        if rows and chosen not in columns:
            raise InputError(
                f"{flag} {file}: no column {chosen or 'prompt'!r} in the first line, which has "
                f"{', '.join(columns)}; choose one as {path.name}:column"
            )
        prompts = [row[chosen] or "" for row in rows]
    prompts = [" ".join(part.strip() for part in p.split("\n")).strip() for p in prompts]
    prompts = [Prompt(p, row) for p, row in zip(prompts, rows, strict=True) if p]
    if not prompts:
        raise InputError(f"{flag} {file}: holds no prompt; write at least one into it, or give another file")
    return prompts


def split_column(file: str) -> tuple[str, str]:
    """(name of the file, column or "") of file.csv:column."""
    name, _, column = file.rpartition(":")
    return (name, column) if Path(name).suffix in (".csv", ".tsv", ".jsonl") else (file, "")


def read_table(lines: list[str], suffix: str, prefix: str) -> tuple[list[str], list[dict]]:
    """(columns, rows) of a .csv or .tsv file; a row with too few fields has None in the others. InputError,
    after `prefix`, naming the line, for a quotation mark without its second one, or more fields than columns.
    """
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
    reader, rows, line = csv.reader(lines, **options), [], 1
    try:
        columns = next(reader, [])
        line = reader.line_num + 1  # on which the next row begins
        for fields in reader:
            if len(fields) > len(columns):
                sign = "tabs are" if suffix == ".tsv" else "commas are"
                cure = "take them out" if suffix == ".tsv" else 'write it in quotation marks, "like, this"'
                raise InputError(
                    f"{prefix}: line {line} has {len(fields)} fields, the first line has {len(columns)}; if "
                    f"{sign} part of a prompt, {cure}, or give a .txt file (one prompt a line)"
                )
            if fields:
                rows.append(dict.fromkeys(columns) | dict(zip(columns, fields)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{prefix}: the row on line {line} is no proper {suffix} row ({error}); close its quotation "
            "marks and double those that are part of a prompt, or give a .txt file (one prompt a line)"
        ) from None
    return columns, rows


def choose_column(columns) -> str | None:
    """The first of PROMPT_COLUMNS among the names, in any case."""
    by_name = {c.strip().lower(): c for c in reversed(list(columns))}
    return next((by_name[p] for p in PROMPT_COLUMNS if p in by_name), None)


def warn_of_overlap(prompts: list[str], held_out: list[str]) -> None:
    """Print a warning if prompts are both trained on and held out."""
    trained = {p.casefold() for p in prompts}
    both = [p for p in held_out if p.casefold() in trained]
    if both:
        print(
            f"warning: {len(both)} of the {len(held_out)} held-out prompts are trained on as well, for "
            f"instance {both[0]!r}; the held-out results are then not quite held out",
            file=sys.stderr,
        )
