"""The domain: plain frozen data and pure functions; standard library and numpy only."""
