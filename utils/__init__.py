"""What surrounds a run and is no step of a method: run folders, prompt files, folders of images, figures."""
