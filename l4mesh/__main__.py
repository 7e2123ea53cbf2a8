from l4mesh.cli import main

main()
