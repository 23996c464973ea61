"""Sample design (SDE, arXiv 2404.13033): structured records <-> training samples, both ways, under every option of the paper.

    row of records.jsonl -> read() -> Item(text, record, reasons) -> sample() -> a `messages` row for data.py
    a model's answer -> parse() -> Parsed(record, how)            parse(render(record)) == record, strictly, for every Design

A Schema says which fields a record has and how they are worded; a Design says how the sample is written. What separates values is
never ambiguous: a value that holds a separator of its design is written as a JSON string, and read back as one.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field as Option

from . import options
from .data import Source, open_file, problem_of
from .errors import UserError, did_you_mean
from .options import Options
from .reading import Broken, DataError, Item as Row, find_files

Language = Literal["en", "zh"]
Kind = Literal["label", "spans", "text"]
Value = str | list[str] | None
Record = dict[str, Value]  # field -> label's name | spans | text; None and [] are unmentioned
