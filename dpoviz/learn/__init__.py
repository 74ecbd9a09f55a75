"""For the notebooks: answer checks of the exercises, and sliders."""
