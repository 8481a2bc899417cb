"""The seven families of ops. Each file: formula, shapes, checks, the public function, and a float64 truth for the tests."""
