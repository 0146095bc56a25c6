"""Image sources turned into TFDS data sets in ArrayRecord form, which train at full speed."""
