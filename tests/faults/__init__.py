"""Seeded faults in everything that users hand to a command: `mutations` of `originals` make `cases`, and `wild` makes
inputs odd as people's are; `harness` runs them in `worker` processes and judges by one rule."""
