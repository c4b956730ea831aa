"""The process that renders chat templates for ``lm.templates``; it is run as a script, and imports neither jrl nor JAX.

Reads lines of JSON, first the template, then what it is given; writes for each a line, ``{"text": ...}`` or ``{"error": ...}``.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space
LONGEST = 10_000_000  # characters of a text


class _Generation(Extension):
    """``{% generation %}``, by which some templates mark the assistant's text: what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _compile(template: str) -> Any:
    """As ``transformers`` compiles them: sandboxed, for a file's template is somebody's program."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False} | how)
    return environment.from_string(template)


def _answer(work: Any, seconds: float) -> dict[str, Any]:
    """What ``work()`` gives, within ``seconds`` of CPU time: then the process ends, whatever it is doing."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return work()
    except MemoryError:
        return {"error": f"fails: it takes more than {MEMORY >> 30} GiB of memory"}
    except RecursionError:
        return {"error": "fails: it is nested too deep"}
    except TemplateError as error:
        return {"error": f"refuses: {error}"}
    except Exception as error:
        return {"error": f"fails: {type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _serve(seconds: float) -> None:
    for name, value in {"AS": MEMORY, "FSIZE": 0, "CORE": 0, "NOFILE": 64}.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    compiled: Any = None

    def compiles() -> dict[str, Any]:
        nonlocal compiled
        compiled = _compile(message)
        return {"text": ""}

    def renders() -> dict[str, Any]:
        text = compiled.render(**message)
        if len(text) > LONGEST:
            return {"error": f"fails: it writes {len(text):,} characters, more than {LONGEST:,}"}
        return {"text": text}

    for line in sys.stdin:
        message = json.loads(line)
        print(json.dumps(_answer(renders if compiled else compiles, seconds)), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
