"""Seeded faults in everything that users hand to a command: `originals` are damaged by `mutations` into `cases`, which
`harness` runs in `worker` processes and judges by one rule."""
