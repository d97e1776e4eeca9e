"""What everything stands on: errors, specs and recipes, slots, the journal, clocks and budgets, devices and ranks."""
