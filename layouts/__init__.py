"""Molecules of QM9: a diffusion model of heavy atoms in space, its judge, and GRAFT on it."""
