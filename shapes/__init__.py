"""The shapes: a renderer, a checker and a small Stable Diffusion trained on their images."""
