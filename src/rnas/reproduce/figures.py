"""Fig. 1 to 5 from the runs of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rnas import published as paper
from rnas.errors import RnasError
from rnas.genotype import Genotype
from rnas.report import cells_drawing
from rnas.report.distortion import Maps, deep_layer, depths, distortion_panels, feature_figure, maps_of, read_measured
from rnas.report.drawing import theme
from rnas.report.drawing.charts import Bubble, Mark, bubble_chart, dot_chart, percent
from rnas.report.drawing.shapes import Drawing, Text, arranged
from rnas.reproduce.plan import AT, ST, Plan, Row
from rnas.reproduce.results import Value, collect, evaluation, value


def draw(plan: Plan, failed: Mapping[Path, str]) -> Drawing:
    """The plan's figure. RnasError if nothing of it was measured."""
    match plan.number:
        case 1:
            return trade_off(plan, failed)
        case 2:
            return feature_maps(plan)
        case 3:
            return distortion_by_layer(plan)
        case 4:
            return cells()
        case _:
            return bounds(plan)


def trade_off(plan: Plan, failed: Mapping[Path, str]) -> Drawing:
    """Fig. 1: AutoAttack accuracy against clean accuracy; a bubble's area is the number of parameters."""
    bubbles = []
    for line in collect(plan, failed, 1):
        clean, robust = line.values["at_clean"].mean, line.values["at_aa"].mean
        if clean is not None and robust is not None:
            role = theme.series(1 if line.model.startswith("RNAS") else 0)
            bubbles.append(Bubble(line.model, clean / 100, robust / 100, line.parameters or 0.0, role))
    if not bubbles:
        raise _nothing(plan)
    return bubble_chart(
        bubbles,
        title="Robust against clean accuracy",
        description="; ".join(f"{b.name}: clean {percent(b.x)}, AutoAttack {percent(b.y)}" for b in bubbles) + ".",
        across_name="clean accuracy →",
        up_name="↑ accuracy under AutoAttack",
        form=lambda share: f"{100 * share:.3g}\u202f%",
        width=620,
        height=460,
    )


def feature_maps(plan: Plan) -> Drawing:
    """Fig. 2: Conv4_3 of VGG16, ST and AT; then several depths of each."""
    groups: list[Maps] = []
    networks = [
        read_measured(folder, training.upper())
        for row in plan.rows
        for training in (ST, AT)
        if (folder := row.runs[training][0] / "distortion").exists()
    ]
    if not networks:
        raise _nothing(plan)
    for network in networks:
        layer = deep_layer(network.layers)
        groups.append(maps_of(network, layer, f"{network.name} {layer}"))
    for network in networks:
        groups += [Maps(f"{network.name} {m.name}", m.clean, m.adversarial) for m in depths(network)]
    return feature_figure(groups, "Feature maps of VGG16, clean and adversarial")


def distortion_by_layer(plan: Plan) -> Drawing:
    """Fig. 3: a panel for each architecture and data set, ST and AT together."""
    panels = []
    for row in plan.rows:
        networks = [
            read_measured(folder, training.upper())
            for training in (ST, AT)
            if (folder := row.runs[training][0] / "distortion").exists()
        ]
        for panel in distortion_panels(networks):
            panel.title = f"{row.model}, {Path(row.data).stem}"
            panels.append(panel)
    if not panels:
        raise _nothing(plan)
    return arranged(panels, 2, "Distortion by layer")


def cells() -> Drawing:
    """Fig. 4: the published cells."""
    drawings = []
    for name in ("RNAS-H", "RNAS-L"):
        genotype = paper.genotype(name)
        assert isinstance(genotype, Genotype)
        drawing = cells_drawing(genotype)
        drawing.title = name
        drawings.append(drawing)
    return arranged(drawings, 1, "The cells of RNAS-H and RNAS-L")


def bounds(plan: Plan) -> Drawing:
    """Fig. 5: a panel for each data set, a row for each bound H, the largest first."""
    panels = []
    for data in dict.fromkeys(row.data for row in plan.rows):
        rows: list[tuple[str, list[Mark | None]]] = []
        for row in (r for r in plan.rows if r.data == data):
            clean, robust = (_measured(plan, row, key) for key in ("clean", "pgd20"))
            if clean is not None and robust is not None:
                rows.append((f"H = {row.model}", [_mark(robust, "adversarial"), _mark(clean, "clean", hollow=True)]))
        if rows:
            described = "; ".join(f"{name}: PGD-20 {percent(m[0].value)}" for name, m in rows if m[0])
            panels.append(dot_chart(rows, title=Path(data).stem, description=described + "."))
    if not panels:
        raise _nothing(plan)
    out = arranged(panels, len(panels), "Clean (open) and PGD-20 (filled) accuracy against the bound H")
    out.shapes += [
        Text(8, out.height + 4, "○ clean accuracy", 12, "clean"),
        Text(130, out.height + 4, "● PGD-20 accuracy", 12, "adversarial"),
    ]
    out.height += 16
    return out


def _measured(plan: Plan, row: Row, key: str) -> Value | None:
    found = [e for folder in row.runs[AT] if (e := evaluation(plan, folder, key)) is not None]
    return value([a for a, _ in found], min(n for _, n in found)) if found else None


def _mark(v: Value, role: str, hollow: bool = False) -> Mark:
    assert v.mean is not None
    assert v.interval is not None
    return Mark(v.mean / 100, role, (v.interval[0] / 100, v.interval[1] / 100), hollow)


def _nothing(plan: Plan) -> RnasError:
    return RnasError(f"{plan.settings.what}: none of its runs succeeded, so there is nothing to draw")
