"""Ray as the stages use it: sessions, parts through actors, training workers, accounting."""
