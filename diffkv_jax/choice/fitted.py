"""`FittedPolicy`: what `fit_policy` chose, with what it measured, bound to its model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from diffkv_jax.arguments import file_path, flag, number, refuse, text
from diffkv_jax.calibration.calibration import Calibration, fingerprint
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.keep import Keep, Thresholds
from diffkv_jax.policy.policy import CompressionPolicy

FILE, ARRAYS, VERSION = "fitted_policy.json", "calibration", 1


@dataclass(frozen=True)
class FitReport:
    """What a fitted policy cost on text that the fit did not see.

    Attributes:
        kl, kl_error: mean Kullback-Leibler divergence from the full cache, nats, and half of its
            95 % confidence interval.
        going_on, repeated: the same of text that goes on, and of a passage that is repeated.
        top1: share of positions where both rank the same token first.
        recall, recall_full: share of a repeated passage's tokens that the compressed and the full
            cache rank first.
        share: allocated bytes of a plain bfloat16 cache's at `context` tokens.
        context: tokens that `share` is told for.
        measured: tokens of context that the texts had.
        rows: texts that were reported on.
        fitted_kl: mean KL on the texts of the fit.
    """

    kl: float
    kl_error: float
    going_on: float
    repeated: float
    top1: float
    recall: float
    recall_full: float
    share: float
    context: int
    measured: int
    rows: int
    fitted_kl: float


def _number(name: str, value: Any) -> Any:
    """As it is, where it is one; of too short a text a figure may be NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(name, value, "a number", True)
    return value


def _shown(keep: Keep) -> str:
    """Thresholds of each head as how many have which."""
    if not isinstance(keep, Thresholds) or not np.ndim(keep.alpha_high):
        return repr(keep)
    values, counts = np.unique(np.asarray(keep.alpha_high), return_counts=True)
    high = (f"{value:g} in {count} heads" for value, count in zip(values, counts, strict=True))
    return f"alpha_high {' and '.join(high)}, alpha_low {keep.alpha_low:g}"


@dataclass(frozen=True)
class FittedPolicy:
    """A policy for one model; `generate`, `teacher_forced` and `make_cache` take it as `policy=`.

    Attributes:
        policy: the choice.
        calibration: what its transform learned; None if it learns nothing.
        report: what it costs.
        fingerprint: of the model and parameters, as `Calibration` has it.
        goal: what was asked for: "share" or "target_kl" and a number.
    """

    policy: CompressionPolicy
    calibration: Calibration | None
    report: FitReport
    fingerprint: str
    goal: Mapping[str, float]

    def check(self, model: CausalLM, params: Mapping[str, Any]) -> None:
        """Refuse another model or other parameters (ValueError)."""
        if self.fingerprint != fingerprint(model, params):
            raise ValueError(
                f"policy {self.policy.name!r} was fitted to another model or other parameters: "
                "call fit_policy with this one"
            )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write one JSON file and the calibration's arrays into a new folder.

        Raises:
            TypeError: `folder` is no path.
            ValueError: something is there and `overwrite` is not given, or it cannot be written.
        """
        folder, overwrite = file_path("folder", folder), flag("overwrite", overwrite)
        if folder.exists() and not (folder.is_dir() and overwrite):
            refuse("folder", str(folder), "a folder that is not there yet, or overwrite=True")
        found = {
            "version": VERSION,
            "policy": json.loads(self.policy.to_json()),
            "calibrated": self.calibration is not None,
            "report": asdict(self.report),
            "fingerprint": self.fingerprint,
            "goal": dict(self.goal),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE).unlink(missing_ok=True)  # without it nothing half written is loaded
            if self.calibration is not None:
                self.calibration.save(folder / ARRAYS, overwrite=True)
            (folder / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            refuse("folder", str(folder), f"a folder that can be written ({error})")

    @staticmethod
    def load(folder: str | Path) -> "FittedPolicy":
        """What `save` wrote.

        Raises:
            TypeError: `folder` is no path.
            ValueError: there is no readable fitted policy.
        """
        folder = file_path("folder", folder)
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']}, and {VERSION} is known")
            report = {name: _number(name, value) for name, value in found["report"].items()}
            return FittedPolicy(
                CompressionPolicy.from_mapping(found["policy"]),
                Calibration.load(folder / ARRAYS) if found["calibrated"] else None,
                FitReport(**report),
                text("fingerprint", found["fingerprint"]),
                {name: number(name, value) for name, value in found["goal"].items()},
            )
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"folder={str(folder)!r} must be one that FittedPolicy.save wrote "
                f"({type(error).__name__}: {error}): fit again"
            ) from error

    def __str__(self) -> str:
        report = self.report
        table = Table("", "", title=f"policy {self.policy.name!r}", show_header=False)
        tiers = " and ".join(self.policy.tiers)
        table.add_row("tiers", tiers)
        table.add_row("transform", repr(self.policy.transform))
        table.add_row("keep", _shown(self.policy.keep))
        table.add_row("bytes", f"{report.share:.1%} of bfloat16 at {report.context} tokens")
        kl = f"{report.kl:.4f} +- {report.kl_error:.4f} (on the texts of the fit "
        table.add_row("mean KL", f"{kl}{report.fitted_kl:.4f})")
        parts = f"text that goes on {report.going_on:.4f}, repeated {report.repeated:.4f}"
        table.add_row("  of it", parts)
        table.add_row("same first token", f"{report.top1:.1%}")
        recall = f"{report.recall:.1%}, of the full cache {report.recall_full:.1%}"
        table.add_row("recall of a passage", recall)
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        return capture.get()
