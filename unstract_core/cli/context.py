"""The context of one run of the command: its common options, its transport, and its exit code."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import attrs
import click

from unstract_core import discovery
from unstract_core.cli import process_exit
from unstract_core.cli.app_import import as_configuration_error, make_here_importable, raised_at
from unstract_core.cli.process_exit import FAILED, INTERRUPTED
from unstract_core.cli.render.masking import mask
from unstract_core.cli.render.output import TRACE, marked_traceback, printable
from unstract_core.errors import ConfigurationError, ContractError, NotSupported
from unstract_core.transport import Transport

PROGRAM = "unstract-wire"

Command = TypeVar("Command", bound=Callable[..., Any])


@attrs.define
class CliContext:
    """The common options of one run of the command, and how its process exits.

    Attributes:
        url: The transport's URL; empty for none.
        debug: Whether tracebacks are shown.
        silent: Whether another process reports an error of this one.
        at_once: Whether the process exits without the interpreter's clean-up; True after a worker has stopped.
    """

    url: str = ""
    debug: bool = False
    silent: bool = False
    at_once: bool = False

    @contextlib.contextmanager
    def transport(
        self, capability: str | None = None, *, asking: Callable[[Any], object] | None = None
    ) -> Iterator[Transport]:
        """Open the transport, and close it after the block.

        Args:
            capability: The capability that the command needs; None for none.
            asking: The call that needs the capability. A transport that refuses it may say what to do instead.

        Raises:
            ConfigurationError: There is no URL, or no transport for it.
            NotSupported: The transport does not have the capability.
        """
        if not self.url:
            raise ConfigurationError(
                "no transport: give --url or set UNSTRACT_WIRE_URL, such as postgresql://user@host/database"
            )
        if "://" not in self.url:
            make_here_importable()
        with as_configuration_error(f"the transport {self.url}"):
            transport = discovery.load_transport(self.url)
        try:
            if capability is not None and not getattr(transport.capabilities, capability):
                reason = _refusal(transport, capability, asking)
                raise NotSupported(f"the transport {self.url} cannot do this: {reason}")
            yield transport
        finally:
            transport.close()

    def mask(self, text: str) -> str:
        """Return `text` with all passwords masked, also those of this transport's URL."""
        return mask(text, self.url)


def _refusal(transport: Transport, capability: str, asking: Callable[[Any], object] | None) -> str:
    """Return the reason why the transport cannot do this: the transport's own text if it has one."""
    with contextlib.suppress(Exception):
        try:
            if asking is not None:
                asking(transport)
        except NotSupported as exc:
            return str(exc)
    return f"it does not claim the capability {capability!r}"


class CliGroup(click.Group):
    """A group of commands whose `main` exits with a code, and prints one line on standard error for an error."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        cli = CliContext()
        kwargs |= {"prog_name": PROGRAM, "standalone_mode": False, "obj": cli}
        quiet = logging.NullHandler()  # a driver's warnings must not be printed beside the error line
        logging.root.addHandler(quiet)
        try:
            code = super().main(*args, **kwargs)
        except click.Abort:
            code = INTERRUPTED
        except click.UsageError as exc:
            command = exc.ctx.command_path if exc.ctx is not None else PROGRAM
            code = _report_error(cli, f"{exc.format_message()} (see '{command} --help')")
        except click.ClickException as exc:
            code = _report_error(cli, exc.format_message())
        except ContractError as exc:
            code = _report_error(cli, str(exc) or type(exc).__name__, exc)
        except Exception as exc:
            hint = "" if cli.debug else "; run it again with --debug to see the traceback"
            code = _report_error(cli, f"unexpected {type(exc).__name__}{raised_at(exc)}{hint}", exc)
        finally:
            logging.root.removeHandler(quiet)
        if cli.at_once:
            process_exit.exit_code = code or 0
        sys.exit(code)


def _report_error(cli: CliContext, problem: str, exc: BaseException | None = None) -> int:
    if cli.silent:
        return FAILED
    with contextlib.suppress(OSError):
        if cli.debug and exc is not None:
            text = marked_traceback("".join(traceback.format_exception(exc))).removeprefix(TRACE)
            click.echo(cli.mask(text), err=True)
        click.echo(f"{PROGRAM}: {printable(' '.join(cli.mask(problem).split()))}", err=True)
    return FAILED


def _set_option(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value:
        setattr(context.ensure_object(CliContext), str(option.name), value)


def common(*, variables: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that adds the common options. Every command has them; the last one given applies.

    Args:
        variables: Whether the environment variables UNSTRACT_WIRE_URL and UNSTRACT_WIRE_DEBUG are read.
    """
    url = click.option(
        "--url",
        metavar="URL",
        envvar="UNSTRACT_WIRE_URL" if variables else None,
        callback=_set_option,
        expose_value=False,
        help="The transport: postgresql://user@host/database, or module:factory. Default: $UNSTRACT_WIRE_URL.",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        envvar="UNSTRACT_WIRE_DEBUG" if variables else None,
        callback=_set_option,
        expose_value=False,
        help="Show the traceback of an error. Default: $UNSTRACT_WIRE_DEBUG.",
    )

    def add(command: Command) -> Command:
        return url(debug(command))

    return add


def queue_name(typed: str) -> str:
    """Return the name of a queue. Raises BadParameter if it is not UTF-8: drivers cannot send such a name."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise click.BadParameter(f"{typed!r} is not UTF-8.") from None
    return typed


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for scripts.")
