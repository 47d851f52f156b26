"""Tables and plots of runs, clients and studies."""
