"""Properties by DFT and by experiment, each with its source: what `properties.py` prints beside a potential's.

Values without a source that we could name are left out. Where DFT is another functional, or the state another one, the
source says so. "data": of the frames on which the potential was trained, so of its own level of theory.
"""

from typing import NamedTuple


class Value(NamedTuple):
    value: float
    source: str


class Published(NamedTuple):
    dft: Value | None = None
    experiment: Value | None = None


MP = "PBE, Materials Project mp-149"
STRAINED = "data: frames strained by 2 % either way"
LITHIUM_STRAINED = "data: frames strained by 0.5 % either way"
SLABS = "data: a relaxed slab"
LDA_PHONONS = "LDA, Giannozzi et al., PRB 43, 7231 (1991)"
LDA_SURFACES = "LDA, Stekolnikov et al., PRB 65, 115318 (2002)"
HALL = "298 K, Hall, Phys. Rev. 161, 756 (1967)"
NEUTRONS = "neutrons, as quoted by Giannozzi et al. (1991)"
DICKINSON = "298 K, Dickinson and Armstrong, JAP 38, 602 (1967)"
KITTEL = "78 K, Kittel, Introduction to Solid State Physics"
EAGLESHAM = "Eaglesham et al., PRL 70, 1643 (1993)"

SILICON = {
    "lattice constant": Published(Value(5.469, "data: no stress there"), Value(5.431, "298 K, handbooks")),
    "C11": Published(Value(153, STRAINED), Value(165.6, HALL)),
    "C12": Published(Value(57, STRAINED), Value(63.9, HALL)),
    "C44": Published(Value(75, MP), Value(79.5, HALL)),
    "C44, atoms held": Published(Value(99, STRAINED)),
    "vacancy": Published(None, Value(3.6, "positrons, Dannefaer et al., PRL 56, 2195 (1986)")),
    "surface (100), 1x1": Published(Value(2.39, LDA_SURFACES)),
    "surface (100), 2x1": Published(Value(1.28, SLABS), Value(1.36, EAGLESHAM)),
    "surface (111), 1x1": Published(
        Value(1.51, "data: a slab with forces to 0.35 eV/Å"), Value(1.23, "7x7, " + EAGLESHAM)
    ),
    "phonon, Gamma, optical": Published(Value(517, LDA_PHONONS), Value(517, NEUTRONS)),
    "phonon, X, TA": Published(Value(146, LDA_PHONONS), Value(150, NEUTRONS)),
    "phonon, X, LA/LO": Published(Value(414, LDA_PHONONS), Value(410, NEUTRONS)),
    "phonon, X, TO": Published(Value(466, LDA_PHONONS), Value(463, NEUTRONS)),
    "melt, first peak": Published(None, Value(2.50, "1,733 K, Waseda and Suzuki, Z. Phys. B 20, 339 (1975)")),
}
MOLYBDENUM = {
    "lattice constant": Published(Value(3.169, "data: no stress there"), Value(3.147, "298 K, handbooks")),
    "C11": Published(Value(479, STRAINED), Value(463.7, DICKINSON)),
    "C12": Published(Value(163, STRAINED), Value(157.8, DICKINSON)),
    "C44": Published(Value(109, STRAINED), Value(109.2, DICKINSON)),
    "vacancy": Published(None, Value(3.0, "positrons, Maier et al., Phil. Mag. A 40, 701 (1979)")),
    "surface (110), 1x1": Published(Value(2.81, SLABS)),
    "surface (100), 1x1": Published(Value(3.19, SLABS)),
}
LITHIUM = {
    "lattice constant": Published(Value(3.438, "data: no stress there"), Value(3.51, "298 K, handbooks")),
    "C11": Published(Value(16.5, LITHIUM_STRAINED), Value(14.8, KITTEL)),
    "C12": Published(Value(14.3, LITHIUM_STRAINED), Value(12.5, KITTEL)),
    "C44": Published(Value(9.4, LITHIUM_STRAINED), Value(10.8, KITTEL)),
    "surface (110), 1x1": Published(Value(0.49, SLABS)),
    "surface (100), 1x1": Published(Value(0.46, SLABS)),
}
SKINNER = "295 K, Skinner et al., J. Chem. Phys. 138, 074506 (2013)"
HOLZ = "330 K, formula of Holz, Heil, Sacco, PCCP 2, 4740 (2000)"
WATER = {  # DFT is that of rdf_dft.json: quantum nuclei, those of the simulation are classical
    "O-O, first peak": Published(None, Value(2.80, SKINNER)),
    "O-O, height": Published(None, Value(2.57, SKINNER)),
    "hydrogen bonds of a molecule": Published(Value(3.64, "data: every fourth training frame, counted the same way")),
    "diffusion, infinite box": Published(None, Value(4.49, HOLZ)),
}
ACETYLACETONE = {
    "enol O-H stretch": Published(
        None, Value(2750, "broad; Tayyari and Milani-nejad, Spectrochim. Acta A 56, 2679 (2000)")
    ),
    "H-transfer barrier": Published(Value(0.014, "data: highest of 15 images in test_H_transfer.xyz")),
}
PUBLISHED = {
    "silicon-pbe": SILICON,
    "molybdenum-pbe": MOLYBDENUM,
    "lithium-pbe": LITHIUM,
    "water-pbe0": WATER,
    "acetylacetone-pbe": ACETYLACETONE,
}
