"""make sanitize: the C++ library and its ops under what sees an access outside of an array, or a race. See __main__.py."""
