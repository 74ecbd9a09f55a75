"""What is looked at and tried: a finished run and its widgets; the checks and sliders of the notebooks."""
