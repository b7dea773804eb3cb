"""Result rows as curves, pictures and a page."""
