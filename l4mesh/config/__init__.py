"""The configuration language: YAML text to ``model.Config``, or every mistake at once.

``files`` opens what is read, ``quantities`` reads single values, ``yaml`` turns text into plain data and knows the line of each key,
``schema`` holds the keys with their defaults, ``load`` merges files and checks what only the whole can tell. It reads files, and
nothing else.
"""
