"""The infrared spectrum of acetylacetone from dynamics: forces by a shipped potential, dipoles by a model made here.

Some frames of the dynamics are labelled with dipoles (GFN2-xTB, `pip install tblite`; any code does), `segnn train
--target dipole` learns them in a minute, and the dipoles of all frames give the spectrum, absorption in km cm/mol.
The strong bands are the C=O and C=C stretches of the enol ring near 1600 cm^-1; the hydrogen bond smears out the O-H
stretch. Nuclei are classical.

SEGNN_STEPS: steps of 0.5 fs (40,000, 20 ps); every fourth is looked at.
"""

import os

import ase.io
import numpy as np
from tblite.ase import TBLite

from segnn_ase import SEGNNCalculator
from segnn_ase.md import MDConfig, run_md
from segnn_ase.properties import PropertyTraining, train_properties
from segnn_ase.spectrum import spectrum
from segnn_ase.store.shipped import find_model

STEPS = max(int(os.environ.get("SEGNN_STEPS", 40_000)), 400)
TIMESTEP, EVERY, KELVIN = 0.5, 4, 300.0
LABELLED = min(200, STEPS // EVERY // 5)
EPOCHS = 60 if STEPS > 4000 else 2


def main():
    atoms = ase.io.read(find_model("acetylacetone-pbe").with_name("reference.xyz"), 0)
    atoms.calc = SEGNNCalculator("acetylacetone-pbe", device="cpu")
    run_md(
        atoms,
        MDConfig(
            ensemble="langevin",
            temperature=KELVIN,
            friction=0.001,  # weak: a strong one widens bands
            timestep=TIMESTEP,
            steps=STEPS,
            trajectory="infrared_md.xyz",
            save_every=EVERY,
        ),
        overwrite=True,
    )
    frames = ase.io.read("infrared_md.xyz", ":")
    labelled = []
    for n in np.linspace(0, len(frames) - 1, LABELLED).astype(int):
        one = frames[n].copy()
        one.calc = TBLite(method="GFN2-xTB", verbosity=0)
        one.get_dipole_moment()
        labelled.append(one)
    ase.io.write("dipoles.xyz", labelled)
    training = {"epochs": EPOCHS, "learning_rate": 0.01, "device": "cpu"}
    data = {"train": "dipoles.xyz", "target": "dipole"}
    config = {"out": "dipole.pt", "data": data, "model": {"preset": "fast"}, "training": training}
    errors = train_properties(PropertyTraining.parse(config))
    print(f"dipole, RMSE of a component on frames that were not learned: {errors['valid']['dipole_rmse']:.4f} e Å")
    told = spectrum("infrared_md.xyz", "infrared", model="dipole.pt", device="cpu", overwrite=True)
    print("\n".join(told))
    table = np.genfromtxt("infrared.infrared.csv", delimiter=",", skip_header=1)
    for low, high, what in ((1500, 1750, "C=O, C=C"), (2800, 3200, "C-H")):
        inside = (table[:, 0] > low) & (table[:, 0] < high)
        area = np.sum(table[inside, 1]) * (table[1, 0] - table[0, 0])
        strongest = table[inside][table[inside, 1].argmax(), 0]
        print(f"{low} to {high} cm^-1 ({what}): {area:.0f} km/mol, strongest at {strongest:.0f}")


if __name__ == "__main__":
    main()
