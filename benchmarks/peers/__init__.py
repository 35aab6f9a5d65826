"""Keysift against transformers, llama.cpp and OpenVINO GenAI; the last two in virtual environments of their own."""
