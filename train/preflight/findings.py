"""What a preflight has found."""

import json
from dataclasses import asdict, dataclass, field

from rich.console import Group
from rich.markup import escape
from rich.table import Table

__all__ = ['LEVELS', 'Finding', 'PreflightError', 'Report']

LEVELS = ('ok', 'warning', 'error')
_STYLES = {'ok': 'green', 'warning': 'bold yellow', 'error': 'bold red'}


class PreflightError(ValueError):
    """A run that would not do what its config says."""


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        name: of the check, by which it can be silenced.
        level: 'ok', 'warning' or 'error'.
        expected: what the recipe or the config says.
        found: what the built objects do.
        cause: why the two differ and what to do about it; '' if they agree.
    """

    name: str
    level: str
    expected: str
    found: str
    cause: str = ''


@dataclass
class Report:
    """What a preflight has found.

    Attributes:
        config: the run's name.
        depth: 'quick' or 'full'.
        findings: a check each, in order.
        not_checked: reasons, by the names of the checks that don't apply to the run or were left out.
        seconds: that it took.
    """

    config: str
    depth: str
    findings: list[Finding] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def problems(self) -> list[Finding]:
        """The findings that are not 'ok'."""
        return [finding for finding in self.findings if finding.level != 'ok']

    @property
    def passed(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.level != 'error' for finding in self.findings)

    def require(self) -> None:
        """Raise PreflightError with all errors, if there are any."""
        errors = [finding for finding in self.findings if finding.level == 'error']
        if errors:
            lines = [f'{each.name}: {each.found}. {each.cause}' for each in errors]
            raise PreflightError('\n'.join([f'Preflight of {self.config} found errors.', *lines]))

    def render(self, only_problems: bool = False) -> Group:
        """The findings as a table for rich's console, with a line that sums them up; or the problems alone."""
        parts = []
        shown = self.problems if only_problems else self.findings
        if shown:
            table = Table('check', '', 'expected', 'found', title=f'preflight of {escape(self.config)}', expand=False)
            for each in shown:
                style = _STYLES[each.level]
                found = escape(each.found) + (f'\n[{style}]{escape(each.cause)}[/]' if each.cause else '')
                table.add_row(each.name, f'[{style}]{each.level}', escape(each.expected), found)
            parts.append(table)
        if self.not_checked and not only_problems:
            listed = ', '.join(f'{name} ({reason})' for name, reason in self.not_checked.items())
            parts.append(f'[dim]Not checked: {escape(listed)}[/]')
        parts.append(escape(self.summary))
        return Group(*parts)

    @property
    def summary(self) -> str:
        """One line: how many checks, and how many of each level."""
        counts = {level: sum(each.level == level for each in self.findings) for level in LEVELS}
        return (
            f'preflight ({self.depth}): {len(self.findings)} checks in {self.seconds:.1f} s, {counts["ok"]} ok, '
            f'{counts["warning"]} warnings, {counts["error"]} errors'
        )

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps({'passed': self.passed, **asdict(self)}, indent=2)
