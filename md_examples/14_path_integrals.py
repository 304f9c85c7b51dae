"""Path integrals of liquid water in i-PI: the quantum O-H bond beside the classical one.

    make engines                                # i-PI among others
    .venv/bin/python md_examples/14_path_integrals.py

One bead is classical; with SEGNN_BEADS (8), all evaluated in one call, hydrogen spreads by its zero-point motion. The
kinetic energy (centroid virial) of a molecule is 116 meV for classical nuclei at 300 K; with eight beads 288 meV was
measured in 400 steps: eight are not yet enough for a converged value.
"""

import os
import subprocess
import sys
from pathlib import Path

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase import Atoms
from ase.geometry import get_distances

from segnn_ase.engines import ipi_driver
from segnn_ase.store.model_file import find_model

command = Path(sys.executable).with_name("i-pi")
if not command.is_file():
    sys.exit("i-PI is not here; expected its wheel, by make engines")
steps, quantum = int(os.environ.get("SEGNN_STEPS", 600)), int(os.environ.get("SEGNN_BEADS", 8))
start = ase.io.read(find_model("water-pbe0").parent / "reference.xyz", "0")
ase.io.write("water.xyz", Atoms(start.numbers, start.positions, cell=start.cell, pbc=True))

INPUT = """<simulation verbosity='low'>
  <output prefix='beads{beads}'>
    <properties stride='2' filename='out'> [step, temperature{{kelvin}}, kinetic_cv{{electronvolt}}] </properties>
    <trajectory filename='pos' stride='10' format='xyz'> positions{{angstrom}} </trajectory>
  </output>
  <total_steps> {steps} </total_steps>
  <ffdirect name='segnn'>
    <pes> custom </pes>
    <pes_path> {path} </pes_path>
    <parameters> {{template: water.xyz, model: water-pbe0, dtype: float32}} </parameters>
    <batch_size> {beads} </batch_size>
  </ffdirect>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase'> water.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='segnn'/> </forces>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 0.25 </timestep>
        <thermostat mode='pile_g'> <tau units='femtosecond'> 25 </tau> </thermostat>
      </dynamics>
    </motion>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
  </system>
</simulation>
"""

figure, axes = plt.subplots(layout="constrained")
oxygen, hydrogen = (np.flatnonzero(start.numbers == z) for z in (8, 1))
for beads in (1, quantum):
    for old in Path().glob(f"beads{beads}.*"):
        old.unlink()
    Path("input.xml").write_text(INPUT.format(beads=beads, steps=steps, path=ipi_driver.__file__))
    done = subprocess.run([command, "input.xml"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-1000:] + done.stderr[-1000:])
    table = np.loadtxt(f"beads{beads}.out", ndmin=2)
    settled = table[len(table) // 2 :]
    lengths = []
    for path in sorted(Path().glob(f"beads{beads}.pos_*.xyz")):
        frames = ase.io.read(path, ":")
        for frame in frames[len(frames) // 2 :]:
            d = get_distances(frame.positions[oxygen], frame.positions[hydrogen], cell=start.cell, pbc=True)[1]
            lengths.append(d[d < 2.6])
    lengths = np.concatenate(lengths)
    bonds = lengths[lengths < 1.4]
    axes.hist(lengths, bins=np.linspace(0.7, 2.6, 96), density=True, histtype="step", label=f"beads: {beads}")
    energy = 1000 * settled[:, 2].mean() / len(oxygen)
    print(f"beads {beads}: O-H {bonds.mean():.3f} +- {bonds.std():.3f} Å, kinetic energy {energy:.0f} meV a molecule")
axes.set(xlabel="O-H distance / Å", ylabel="distribution")
axes.legend()
figure.savefig("path_integrals.png", dpi=150)
