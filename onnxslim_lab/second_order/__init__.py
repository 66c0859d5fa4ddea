"""Second-order information: what an edit of a layer's weights costs at its output, from the Gram matrix of its inputs."""
