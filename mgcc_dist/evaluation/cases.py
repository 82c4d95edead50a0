"""Choose the images that a gallery shows, by a rule that can be stated under it."""

from collections.abc import Sequence

from mgcc_dist.evaluation.summary import Row

RULE = (
    "Lesions from the worst to the best Dice (the two worst, lower quartile, median, upper quartile, best), the "
    "smallest and the largest lesion, and of the images without lesion the one with the largest false alarm and the "
    "first that is correctly empty."
)


def choose_cases(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return (why, row) of at most ten images by RULE, each once."""
    lesions = sorted((row for row in rows if row["lesion"]), key=lambda row: (row["dice"], row["key"]))
    normals = [row for row in rows if not row["lesion"]]
    cases: list[tuple[str, Row]] = []
    if lesions:
        last = len(lesions) - 1
        cases += [("worst", lesions[0]), ("second worst", lesions[min(1, last)])]
        cases += [
            (name, lesions[round(share * last)])
            for name, share in (("lower quartile", 0.25), ("median", 0.5), ("upper quartile", 0.75), ("best", 1.0))
        ]
        cases.append(("smallest lesion", min(lesions, key=lambda row: row["lesion_area"])))
        cases.append(("largest lesion", max(lesions, key=lambda row: row["lesion_area"])))
    if alarms := [row for row in normals if row["predicted_area"]]:
        cases.append(("largest false alarm", max(alarms, key=lambda row: row["predicted_area"])))
    cases += [("no lesion, empty", row) for row in normals if not row["predicted_area"]][:1]
    chosen: dict[tuple[str, str], tuple[str, Row]] = {}
    for why, row in cases:
        chosen.setdefault((row["dataset"], row["key"]), (why, row))
    return list(chosen.values())
