"""The embedded flow of Fashion-MNIST, its images, and the network whose features judge images."""
