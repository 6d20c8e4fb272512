"""A Ray cluster of several nodes on this machine, with the graph of configs/cluster.yaml on it, in a child process."""
