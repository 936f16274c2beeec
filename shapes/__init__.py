"""The embedded world: a renderer, a checker and a small Stable Diffusion trained on them."""
