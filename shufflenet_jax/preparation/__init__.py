"""Preparation of image sources: writes them as TFDS data sets in ArrayRecord form, which train at full speed."""
