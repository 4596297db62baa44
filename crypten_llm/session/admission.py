"""Whether the owner's model is shared: what the owner measures of it, is shown, and lets the others know.

Owns the owner's side of ``calibration``: which text is measured, for how long, and what is said of it to whom. Measured
numbers are for the owner's terminal alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from crypten_llm import files, limits
from crypten_llm.errors import UsageError, unheard
from crypten_llm.models import tokenizer
from crypten_llm.session import calibration

if TYPE_CHECKING:
    import torch

    from crypten_llm.engines.base import Engine
    from crypten_llm.engines.domain import Calibration
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.calibration import Ranges

WARNING = "warning: "  # what a line begins with that the person at the terminal should see in any case
FORCED = "--force shares it all the same, and marks every answer as not to be trusted"


@dataclass(frozen=True)
class Admission:
    """text: a file that stands for what clients will ask; ``calibration.PROSE`` if there is none. force: share a model
    that was measured outside the engine's ranges. say: shows a text to the owner.
    """

    text: str = ""
    force: bool = False
    say: Callable[[str], None] = lambda text: None

    def decide(
        self,
        engine: Engine,
        folder: Path,
        config: LlamaConfig,
        weights: Mapping[str, torch.Tensor],
        beat: Callable[[], None],
        progress: bool,
    ) -> tuple[Calibration, str]:
        """What was found, and what the others are told is wrong with it: nothing, if all is inside.

        beat: called now and then. Raises UsageError, for all parties to read, for a model that is not shared; and for a
        text that cannot be measured.
        """
        ranges: list[Ranges] = []

        def measure() -> Ranges:
            ranges.append(self.measure(folder, config, weights, beat, progress))
            return ranges[0]

        found = engine.calibrate(measure)
        if found.reached:
            self.say(found.table(ranges[0].tokens))
        return found, self.judge(found)

    def judge(self, found: Calibration) -> str:
        """Warns of little headroom; what is wrong with a model that is shared all the same. Raises UsageError."""
        if warning := found.warning():
            self.say(f"{WARNING}{warning}")
        if not (refusal := found.refusal()):
            return ""
        if not self.force:
            raise UsageError(f"{refusal}; {FORCED}" if found.can_be_forced else refusal)
        if not found.can_be_forced:
            raise UsageError(f"{refusal}; --force is for what was measured alone")
        return refusal

    def measure(
        self,
        folder: Path,
        config: LlamaConfig,
        weights: Mapping[str, torch.Tensor],
        beat: Callable[[], None] = lambda: None,
        progress: bool = False,
    ) -> Ranges:
        """Runs the model in the clear. Raises UsageError for a text that cannot be measured."""
        with unheard():
            text = self._ids(folder, config, sum(weight.numel() for weight in weights.values()))
        total = len(text) + min(calibration.ROWS, config.context)
        with tqdm(desc="measuring", total=total, unit="token", disable=not progress, leave=False) as bar:

            def show(done: int) -> None:
                if done > bar.n:
                    bar.update(done - bar.n)
                beat()

            return calibration.measure(config, weights, text, show)

    def prose(self) -> str:
        """The text that was chosen, or ``PROSE``."""
        return _read(self.text) if self.text else calibration.PROSE.read_text("utf-8")

    def _ids(self, folder: Path, config: LlamaConfig, parameters: int) -> Sequence[int]:
        """Of the text; none of ``PROSE`` where the model's folder has no tokenizer, or another model's."""
        if not self.text:
            try:
                ids = tokenizer.encode(tokenizer.load(folder), calibration.PROSE.read_text("utf-8"))
            except UsageError:
                return ()
            return calibration.enough_of(ids, config, parameters) if max(ids) < config.vocab_size else ()
        text = _read(self.text)
        ids = tokenizer.encode(tokenizer.load(folder), text)
        if not text.strip():
            raise UsageError(f"--calibration-text: {self.text} is empty; give a text like what clients will ask")
        if max(ids) >= config.vocab_size:
            raise UsageError(
                f"--calibration-text: the tokenizer in {folder} has ids up to {max(ids)}, the model "
                f"{config.vocab_size} tokens; put the model's own tokenizer there"
            )
        return ids


def _read(path: str) -> str:
    try:
        return files.read(path, limits.TEXT).decode("utf-8").replace("\r\n", "\n")
    except UsageError as error:
        raise UsageError(f"--calibration-text: {error}; give a text file") from None
    except UnicodeDecodeError:
        raise UsageError(f"--calibration-text: {path} is not UTF-8 text; convert it first") from None
