"""Result of a benchmark: tables of values and ratios, as plain data and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.timing import Spread, ratios


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one contender. A row without a value has the reason in its note."""

    name: str
    value: Spread | None = None
    """In the table's unit."""
    ratio: Spread | None = None
    """To the reference, taken between neighbours in time."""
    bar: float | None = None
    """The most that is allowed: of the ratio where there is one, else of the value."""
    note: str = ""

    @property
    def bar_met(self) -> bool | None:
        """Return True if the median meets the bar; None without a bar or a ratio."""
        measured = self.ratio or self.value
        return None if self.bar is None or measured is None else measured.median <= self.bar

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[float],
        *,
        reference: Sequence[float] | None = None,
        bar: float | None = None,
        note: str = "",
        scale: float = 1.0,
    ) -> "Row":
        """Return the spread of `samples` times `scale`, a factor to the table's unit."""
        return cls(
            name=name,
            value=Spread.of([sample * scale for sample in samples]),
            ratio=None if reference is None else Spread.of(ratios(samples, reference)),
            bar=bar,
            note=note,
        )


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    unit: str
    """Unit of the values, such as "us per step"."""
    rows: Sequence[Row]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one benchmark in one run."""

    benchmark: str
    tables: Sequence[Table]
    faults: Sequence[str] = ()
    """Reasons for void figures, such as differing weights; the run then fails."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The machine and the versions that the figures belong to."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, including for each row whether the bar is met."""
        plain = asdict(self)
        for table, plain_table in zip(self.tables, plain["tables"], strict=True):
            for row, plain_row in zip(table.rows, plain_table["rows"], strict=True):
                plain_row["bar_met"] = row.bar_met
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Report":
        return cls(
            benchmark=plain["benchmark"],
            tables=[_table(table) for table in plain["tables"]],
            faults=plain["faults"],
            environment=plain["environment"],
        )


def _table(plain: Mapping[str, Any]) -> Table:
    return Table(
        title=plain["title"],
        unit=plain["unit"],
        rows=[
            Row(
                name=row["name"],
                value=row["value"] and Spread(**row["value"]),
                ratio=row["ratio"] and Spread(**row["ratio"]),
                bar=row["bar"],
                note=row["note"],
            )
            for row in plain["rows"]
        ],
        notes=plain["notes"],
    )
