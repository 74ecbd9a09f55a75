"""Helpers for the notebooks: answer checks for the exercises, and sliders."""
