"""Where an answer came from: whose lines a prompt's tokens are, and which of them its attention rests on."""
