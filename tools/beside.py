#!/usr/bin/env python
"""Run commands beside each other. The last one speaks as it goes, each other one in one piece when it has ended; the first that fails
ends the rest, is named below what it said, and gives the exit code. Usage: python tools/beside.py 'COMMAND' 'COMMAND' ..."""
import os, shlex, signal, subprocess, sys, tempfile, time

def start(command, said=None):
    "A command as a group of processes of its own; `said` takes its output and errors"
    return subprocess.Popen(shlex.split(command), stdout=said, stderr=said and subprocess.STDOUT, start_new_session=True)

def end(processes):
    "Stop what still runs, with all that it started"
    for o in processes:
        if o.poll() is None: os.killpg(o.pid, signal.SIGTERM)
    for o in processes: o.wait()

def tell(said):
    "What a command said"
    if said:
        said.seek(0)
        sys.stdout.write(said.read().decode(errors='replace'))
        sys.stdout.flush()

def main(commands):
    "Exit code of the first that fails, else 0"
    files = [tempfile.TemporaryFile() for _ in commands[1:]] + [None]
    running = {start(*o): o for o in zip(commands, files)}
    try:
        while running:
            time.sleep(.05)
            for process,(command, said) in [*running.items()]:
                if process.poll() is None: continue
                del running[process]
                if process.returncode: end(running)
                tell(said)
                if process.returncode:
                    print(f'failed: {command}', file=sys.stderr)
                    return process.returncode if process.returncode > 0 else 128 - process.returncode
    finally: end(running)
    return 0

if __name__ == '__main__':
    for o in (signal.SIGINT, signal.SIGTERM): signal.signal(o, lambda number, _: sys.exit(128 + number))   # after what runs has been ended
    sys.exit(main(sys.argv[1:]))
