"""From named sources to the arrays and cohorts that rounds train on."""
