"""Structures that are learned beside the training frames: the old ones of fine-tuning, or a teacher's."""

from typing import NamedTuple

from segnn_ase.data.batches import Item

MEASURED = 4  # one in so many is measured, not learned


class Beside(NamedTuple):
    """Labelled structures beside the frames; those that are measured are none of those that are learned."""

    name: str  # of the set, in the table of errors
    replayed: list[Item]  # learned beside the frames
    each_epoch: int  # how many of these
    held: list[Item]  # measured
    origin: str  # in words
    copies: int = 0  # of each that is learned, among these
    chooses: bool = True  # whether the model and its learning rate are chosen by those that are measured, too

    def told(self) -> str:
        """What becomes of them."""
        copies = " with their copies" if self.copies else ""
        learned = f"{self.each_epoch} of {len(self.replayed)}{copies} are learned in an epoch"
        return f"{self.origin}: {learned if self.replayed else 'none is learned'}, {len(self.held)} are measured"


def beside(name: str, items: list[Item], learned: int, origin: str) -> Beside:
    """Divide structures: every fourth is measured, of the others so many are learned in an epoch, or none."""
    if not learned:
        return Beside(name, [], 0, items, origin)
    others = [item for n, item in enumerate(items) if n % MEASURED]
    return Beside(name, others, min(learned, len(others)), items[::MEASURED], origin)
