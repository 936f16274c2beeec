"""Layouts of pages: a diffusion model of boxes with classes, its judge, and P-GRAFT on it."""
