"""With the command's margin, how a run is laid out does not decide which of its traces stop."""

from tiny_cli import run

from falcon_h1r.reasoning import find_records, read_record

# Many traces of h1r-pico say what one of the warm-up said, so that rounding alone parts their
# confidences. With `--margin 0` these layouts stopped other traces where this was written.
ASK = ["think", "What is 76*50-48-11*55-75?", "--preset", "low", "--no-consensus", "--quiet"]
ASK += ["--k", 2, "--window", 2, "--budget", 48, "--seed", 3]


def ends(capsys, folder, *options):
    status, _, err = run(capsys, *ASK, "--record", folder, *options)
    assert status == 0, err
    (record,) = find_records(folder)
    return [(trace.reason, len(trace.tokens)) for trace in read_record(record).traces]


def test_rows_memory_and_pieces(capsys, tmp_path):
    layouts = [(), ("--rows", 7), ("--rows", 16, "--prefill-chunk", 5), ("--memory", "16MiB")]
    found = [ends(capsys, tmp_path / str(number), *layout) for number, layout in enumerate(layouts)]
    assert any(reason == "low_confidence" for reason, _ in found[0])
    assert all(other == found[0] for other in found[1:])
