"""One run of the command: what it was told on any level, the transport it opens, and how it ends."""

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
from unstract_core.cli.render.output import TRACE, behind_mark, printable
from unstract_core.errors import ConfigurationError, ContractError, NotSupported
from unstract_core.transport import Transport

PROGRAM = "unstract-wire"

Command = TypeVar("Command", bound=Callable[..., Any])


@attrs.define
class CliContext:
    """What one run of the command was told on any level: `--url` and `--debug`."""

    url: str = ""
    debug: bool = False
    silent: bool = False
    """Whether what goes wrong is reported by another process."""
    at_once: bool = False
    """Whether this process ends without the interpreter's clean-up: set when a worker has stopped."""

    @contextlib.contextmanager
    def transport(
        self, capability: str | None = None, *, asking: Callable[[Any], object] | None = None
    ) -> Iterator[Transport]:
        """Open the transport and close it in the end. Raises ConfigurationError, and NotSupported for a capability.

        `asking` is what the capability is wanted for: a transport that refuses it may know what to do instead.
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
                why = _refusal(transport, capability, asking)
                raise NotSupported(f"the transport {self.url} cannot do this: {why}")
            yield transport
        finally:
            transport.close()

    def mask(self, text: str) -> str:
        """Return `text` without any password, this cli's own included."""
        return mask(text, self.url)


def _refusal(transport: Transport, capability: str, asking: Callable[[Any], object] | None) -> str:
    """Say why a transport cannot do what is asked, in its own words where it has some."""
    with contextlib.suppress(Exception):
        try:
            if asking is not None:
                asking(transport)
        except NotSupported as exc:
            return str(exc)
    return f"it does not claim the capability {capability!r}"


class CliGroup(click.Group):
    """The group whose `main` ends in an exit code, with one line on stderr where that is not 0."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        cli = CliContext()
        kwargs |= {"prog_name": PROGRAM, "standalone_mode": False, "obj": cli}
        quiet = logging.NullHandler()  # else a driver's warnings would stand beside the one line
        logging.root.addHandler(quiet)
        try:
            code = super().main(*args, **kwargs)
        except click.Abort:
            code = INTERRUPTED
        except click.UsageError as exc:
            command = exc.ctx.command_path if exc.ctx is not None else PROGRAM
            code = _complain(cli, f"{exc.format_message()} (see '{command} --help')")
        except click.ClickException as exc:
            code = _complain(cli, exc.format_message())
        except ContractError as exc:
            code = _complain(cli, str(exc) or type(exc).__name__, exc)
        except Exception as exc:
            hint = "" if cli.debug else "; run it again with --debug to see the traceback"
            code = _complain(cli, f"unexpected {type(exc).__name__}{raised_at(exc)}{hint}", exc)
        finally:
            logging.root.removeHandler(quiet)
        if cli.at_once:
            process_exit.exit_code = code or 0
        sys.exit(code)


def _complain(cli: CliContext, problem: str, exc: BaseException | None = None) -> int:
    if cli.silent:
        return FAILED
    with contextlib.suppress(OSError):
        if cli.debug and exc is not None:
            text = behind_mark("".join(traceback.format_exception(exc))).removeprefix(TRACE)
            click.echo(cli.mask(text), err=True)
        click.echo(f"{PROGRAM}: {printable(' '.join(cli.mask(problem).split()))}", err=True)
    return FAILED


def _remember(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value:
        setattr(context.ensure_object(CliContext), str(option.name), value)


def common(*, variables: bool = False) -> Callable[[Command], Command]:
    """Add the options that are understood on every level; what stands further to the right wins."""
    url = click.option(
        "--url",
        metavar="URL",
        envvar="UNSTRACT_WIRE_URL" if variables else None,
        callback=_remember,
        expose_value=False,
        help="The transport: postgresql://user@host/database, or module:factory. Default: $UNSTRACT_WIRE_URL.",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        envvar="UNSTRACT_WIRE_DEBUG" if variables else None,
        callback=_remember,
        expose_value=False,
        help="Show the traceback of an error. Default: $UNSTRACT_WIRE_DEBUG.",
    )

    def add(command: Command) -> Command:
        return url(debug(command))

    return add


def queue_name(typed: str) -> str:
    """Take what was typed as a queue's name, where it is text: a command line is bytes, and a driver would choke."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise click.BadParameter(f"{typed!r} is not UTF-8.") from None
    return typed


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for scripts.")
