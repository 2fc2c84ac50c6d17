"""The command line: `bitkv generate | recipes | bench | eval | calibrate | tune`.

Bad input is one sentence on standard error and exit code 2. A command imports torch only once it runs.
"""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from bitkv.cli import bench, calibrate, evaluate, generate, recipes, tune

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

_EXAMPLES = """examples:
  bitkv generate --demo --compare       a question about a long document, 2-bit beside 16-bit
  bitkv recipes                         what can be written after --recipe
  bitkv bench attention --recipe kivi2  decode attention against context length
  bitkv eval --recipe kivi2             what a recipe costs in quality
  bitkv calibrate --recipe 'cq(8, 8)' --output cq8.safetensors   codecs that learn from text
  bitkv tune --bits 1.75 --output mine.txt                       bits for the layers that need them
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the whole usage."""
        raise SystemExit(_fail(f"{message}; see `{self.prog} --help`", BAD_INPUT))


class _Version(argparse.Action):
    def __call__(self, *_: object) -> NoReturn:
        from bitkv import __version__

        print(f"bitkv {__version__}")
        raise SystemExit(0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="bitkv",
        description="Keep a language model's KV cache in 1 to 4 bits and attend to the packed bits.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in (
        ("generate", generate),
        ("recipes", recipes),
        ("bench", bench),
        ("eval", evaluate),
        ("calibrate", calibrate),
        ("tune", tune),
    ):
        sub = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    args.command = shlex.join(["bitkv", *words])
    try:
        with _warnings_as_lines():
            args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except ChildProcessError as error:
        return _fail(str(error), FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename and error.strerror else ""
        return _fail(f"{where}{error.strerror or error}", BAD_INPUT)
    except ValueError as error:
        return _fail(str(error), BAD_INPUT)
    return 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What bitkv warns of is a line, once, as errors are; other packages' warnings stay as they are."""
    package, seen, show = Path(__file__).parents[1], set[str](), warnings.showwarning

    def as_line(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if category is not UserWarning or package not in Path(filename).parents:
            show(message, category, filename, *rest)
        elif str(message) not in seen:
            seen.add(str(message))
            print(f"bitkv: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = as_line  # type: ignore[assignment]
        yield


def _fail(message: str, code: int) -> int:
    print(f"bitkv: {' '.join(message.split())}", file=sys.stderr)
    return code
