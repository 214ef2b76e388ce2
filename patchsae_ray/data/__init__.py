"""Where images come from: data sets by name, units in canonical order, bytes to pixels."""
