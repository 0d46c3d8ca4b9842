//! Writes the corpora anew: `cargo run --example seeds` in this directory. Each file is a short story of what peers
//! say to each other; the order of bytes is that of `src/*.rs`.

use std::{env, fs, io, path::Path};

/// A story, and what it is called.
type Seed = (&'static str, Vec<Vec<u8>>);

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, seeds) in [
        ("card", card()),
        ("ccid", ccid()),
        ("options", options()),
        ("usbredir", usbredir()),
        ("usbip", usbip()),
        ("vscard", vscard()),
    ] {
        let directory = root.join(target);
        fs::create_dir_all(&directory)?;
        for (name, pieces) in seeds {
            fs::write(directory.join(name), pieces.concat())?;
        }
    }
    Ok(())
}

fn block(bytes: &[u8]) -> Vec<u8> {
    match u8::try_from(bytes.len()) {
        Ok(length @ ..0xFE) => [&[length], bytes].concat(),
        _ => [&[0xFE], &(bytes.len() as u16).to_le_bytes()[..], bytes].concat(),
    }
}

/// These bytes and so many more.
fn long(bytes: &[u8], more: u16) -> Vec<u8> {
    [&[0xFF, bytes.len() as u8], bytes, &more.to_le_bytes()].concat()
}

fn bytes(bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

const SELECT: [u8; 11] = [0x00, 0xA4, 0x04, 0x00, 0x06, 0xA0, 0x00, 0x00, 0x00, 0x79, 0x03];

// ---- cards, for all readers -----------------------------------------------------------------------------

fn insert(event: u8, slot: u8) -> Vec<u8> {
    vec![event, 0, slot]
}

fn remove(event: u8, slot: u8) -> Vec<u8> {
    vec![event, 1, slot]
}

fn powered(event: u8) -> Vec<u8> {
    vec![event, 2, 0, 0]
}

fn response(event: u8, data: &[u8]) -> Vec<u8> {
    [&[event, 2, 0, 3], &block(data)[..]].concat()
}

fn response_of(event: u8, length: u16) -> Vec<u8> {
    [&[event, 2, 0, 4], &length.to_le_bytes()[..]].concat()
}

fn failed(event: u8, how: u8) -> Vec<u8> {
    vec![event, 2, 0, how]
}

fn pass(event: u8, milliseconds: u16) -> Vec<u8> {
    [&[event, 4], &(milliseconds / 4).to_le_bytes()[..]].concat()
}

// ---- the device -----------------------------------------------------------------------------------------

fn setup(setup: [u8; 8]) -> Vec<u8> {
    [&[0], &setup[..], &[0]].concat()
}

fn ccid() -> Vec<Seed> {
    const CARD: u8 = 14;
    let configure = || setup([0, 9, 1, 0, 0, 0, 0, 0]);
    // The place of a message's type in the body's list.
    let say = |kind: u8, slot: u8, seq: u8, parameters: [u8; 3], data: Vec<u8>| {
        [&[3, kind, 0, slot, seq], &parameters[..], &data].concat()
    };
    let (on, off, status, xfr) = (0, 1, 2, 3);
    let plain = |kind: u8, seq: u8| say(kind, 0, seq, [0; 3], vec![0]);
    let apdu = |seq: u8| say(xfr, 0, seq, [0; 3], block(&SELECT));
    let read = || bytes(&[7, 0, 0]);
    let packet = || bytes(&[7, 0, 1]);
    let notification = || bytes(&[11, 0]);
    let abort = |slot: u8, seq: u8| bytes(&[1, slot, seq, 0, 4]);
    let one = || bytes(&[0, 0, 0]);
    let up = |config: [u8; 3]| {
        [bytes(&config), configure(), insert(CARD, 0), plain(on, 1), powered(CARD), read()].concat()
    };
    vec![
        (
            "enumeration",
            vec![
                one(),
                setup([0x80, 6, 0, 1, 0, 0, 64, 0]),
                setup([0x80, 6, 0, 6, 0, 0, 10, 0]),
                setup([0x80, 6, 0, 2, 0, 0, 9, 0]),
                setup([0x80, 6, 0, 2, 0, 0, 255, 0]),
                setup([0x80, 6, 0, 3, 0, 0, 255, 0]),
                setup([0x80, 6, 1, 3, 9, 4, 255, 0]),
                setup([0x80, 6, 3, 3, 9, 4, 255, 0]),
                configure(),
                setup([0x80, 8, 0, 0, 0, 0, 1, 0]),
                setup([0x81, 10, 0, 0, 0, 0, 1, 0]),
                setup([0xA1, 2, 0, 0, 0, 0, 4, 0]),
                setup([0xA1, 3, 0, 0, 0, 0, 255, 0]),
                setup([0x82, 0, 0, 0, 0x81, 0, 2, 0]),
                insert(CARD, 0),
                notification(),
                plain(status, 0),
                read(),
            ],
        ),
        ("apdu", vec![up([0, 0, 0]), apdu(2), response(CARD, &[1; 20]), read(), plain(off, 3), read()]),
        ("apdu-full-speed", vec![up([3, 1, 1]), apdu(2), response_of(CARD, 54), packet(), packet(), apdu(3)]),
        (
            "every-message",
            vec![
                up([0, 0, 0]),
                (0..14)
                    .map(|kind| [say(kind, 0, kind, [0; 3], vec![0]), read()].concat())
                    .collect::<Vec<_>>()
                    .concat(),
                (0..14)
                    .map(|kind| [say(kind, 1, kind, [0; 3], vec![0]), read()].concat())
                    .collect::<Vec<_>>()
                    .concat(),
            ],
        ),
        (
            "parameters",
            vec![
                up([0, 0, 0]),
                plain(4, 2),
                plain(5, 3),
                say(6, 0, 4, [1, 0, 0], block(&[0x11, 0x10, 0, 0x4D, 0, 0xFE, 0])),
                say(6, 0, 5, [0, 0, 0], block(&[0x11, 0, 0, 10, 0])),
                say(6, 0, 6, [9, 0, 0], block(&[1; 7])),
                [read(), read(), read(), read(), read()].concat(),
            ],
        ),
        (
            "chained-command",
            vec![
                up([0, 1, 0]),
                say(xfr, 0, 2, [0, 1, 0], block(&[0x5A; 200])),
                read(),
                say(xfr, 0, 3, [0, 3, 0], block(&[0x5A; 250])),
                read(),
                say(xfr, 0, 4, [0, 2, 0], block(&[0x5A; 20])),
                response(CARD, &[]),
                read(),
            ],
        ),
        (
            "chained-answer",
            vec![
                up([0, 1, 0]),
                apdu(2),
                response_of(CARD, 900),
                read(),
                say(xfr, 0, 3, [0, 0x10, 0], vec![0]),
                packet(),
                [packet(), packet(), packet(), packet(), packet()].concat(),
                say(xfr, 0, 4, [0, 0x10, 0], vec![0]),
                apdu(5),
                read(),
            ],
        ),
        (
            "extended",
            vec![
                up([0, 0, 0]),
                say(xfr, 0, 2, [0; 3], long(&[0, 0xDB, 0x3F, 0xFF, 0, 0xFF, 0xFF], 65_535)),
                failed(CARD, 5),
                read(),
                say(xfr, 0, 3, [0; 3], long(&[0, 0xDB, 0x3F, 0xFF, 0, 0xFF, 0xF0], 65_535)),
                read(),
            ],
        ),
        (
            "packets",
            vec![
                up([0, 3, 0]),
                [&[0x83, xfr, 0, 0, 2, 0, 0, 0], &long(&[0, 0xDB, 0x3F, 0xFF, 0xFB], 251)[..]].concat(),
                response_of(CARD, 118),
                [packet(), packet(), packet()].concat(),
                bytes(&[2, 1, 64]),
                vec![0x6F; 64],
                bytes(&[2, 1, 3, 1, 2, 3]),
                bytes(&[2, 1, 0]),
            ],
        ),
        (
            "abort-control-first",
            vec![up([0, 0, 0]), apdu(2), abort(0, 3), apdu(4), plain(12, 3), read(), read()],
        ),
        (
            "abort-bulk-first",
            vec![up([0, 0, 0]), apdu(2), plain(12, 3), apdu(4), abort(0, 3), read(), read()],
        ),
        (
            "abort-mixed",
            vec![up([0, 0, 0]), abort(0, 3), plain(12, 4), abort(0, 5), plain(12, 5), read(), read()],
        ),
        (
            "time-extension",
            vec![
                up([0, 0, 0]),
                apdu(2),
                pass(CARD, 1500),
                read(),
                pass(CARD, 1500),
                pass(CARD, 1500),
                apdu(3),
                response(CARD, &[]),
                read(),
                read(),
            ],
        ),
        (
            "power-on-times-out",
            vec![
                one(),
                configure(),
                insert(CARD, 0),
                plain(on, 1),
                pass(CARD, 40_000),
                powered(CARD),
                read(),
            ],
        ),
        (
            "removed-at-work",
            vec![
                up([0, 0, 0]),
                apdu(2),
                remove(CARD, 0),
                response(CARD, &[]),
                read(),
                notification(),
                insert(CARD, 0),
            ],
        ),
        (
            "swapped-at-work",
            vec![
                up([0, 0, 0]),
                apdu(2),
                insert(CARD, 0),
                notification(),
                read(),
                plain(on, 3),
                powered(CARD),
                read(),
            ],
        ),
        (
            "card-fails",
            vec![
                (6..10)
                    .map(|how| [up([0, 0, 0]), apdu(2), failed(CARD, how), read()].concat())
                    .collect::<Vec<_>>()
                    .concat(),
                plain(on, 9),
                response(CARD, &[]),
                read(),
            ],
        ),
        (
            "reset-at-work",
            vec![
                up([0, 0, 0]),
                apdu(2),
                bytes(&[13]),
                response(CARD, &[]),
                configure(),
                notification(),
                apdu(3),
                read(),
            ],
        ),
        (
            "configured-at-work",
            vec![up([0, 0, 0]), apdu(2), configure(), read(), setup([1, 11, 0, 0, 0, 0, 0, 0]), plain(on, 3)],
        ),
        (
            "halts",
            vec![
                up([0, 0, 0]),
                bytes(&[1, 0, 0, 0, 3]),
                apdu(2),
                bytes(&[1, 0, 0, 0, 2]),
                apdu(3),
                response(CARD, &[1, 2, 3]),
                bytes(&[1, 0x80, 0, 0, 3]),
                read(),
                bytes(&[1, 0x80, 0, 0, 2]),
                read(),
                plain(status, 4),
                read(),
            ],
        ),
        (
            "given-back",
            vec![
                up([0, 0, 0]),
                apdu(2),
                response_of(CARD, 200),
                packet(),
                packet(),
                bytes(&[9, 0, 9, 0]),
                read(),
                bytes(&[9, 0]),
                read(),
                plain(status, 3),
                bytes(&[10, 0, 0]),
            ],
        ),
        (
            "notified-again",
            vec![
                one(),
                configure(),
                insert(CARD, 0),
                bytes(&[0x8B, 0]),
                notification(),
                bytes(&[12, 0x82, 0]),
            ],
        ),
        (
            "unread",
            vec![up([0, 0, 0]), (0..70).map(|seq| plain(status, seq)).collect::<Vec<_>>().concat(), read()],
        ),
        (
            "saved-at-work",
            vec![up([0, 0, 0]), apdu(2), bytes(&[0x8D]), powered(CARD), read(), apdu(3), response(CARD, &[])],
        ),
        (
            "saved-in-parts",
            vec![
                up([0, 1, 0]),
                apdu(2),
                response_of(CARD, 900),
                packet(),
                bytes(&[0x8D]),
                powered(CARD),
                read(),
                say(xfr, 0, 3, [0, 0x10, 0], vec![0]),
                read(),
            ],
        ),
        (
            "saved-with-damage",
            vec![
                up([0, 0, 0]),
                apdu(2),
                bytes(&[0x2D, 40, 0, 1]),
                bytes(&[0x2D, 60, 0, 255]),
                bytes(&[0x2D, 90, 0, 2]),
            ],
        ),
        (
            "four-slots",
            vec![
                bytes(&[1, 0, 0]),
                configure(),
                (0..4).map(|slot| insert(CARD, slot)).collect::<Vec<_>>().concat(),
                notification(),
                (0..5)
                    .map(|slot| [say(on, slot, slot, [0; 3], vec![0]), powered(CARD)].concat())
                    .collect::<Vec<_>>()
                    .concat(),
                (0..4)
                    .map(|slot| say(xfr, slot, 9 + slot, [0; 3], block(&SELECT)))
                    .collect::<Vec<_>>()
                    .concat(),
                response(CARD, &[1]),
                [read(), read(), read(), read(), read(), read()].concat(),
            ],
        ),
        (
            "seven-interfaces",
            vec![
                bytes(&[5, 0, 0]),
                configure(),
                (0..7).map(|slot| insert(CARD, slot)).collect::<Vec<_>>().concat(),
                (0..7)
                    .map(|at| {
                        [
                            bytes(&[11, at]),
                            bytes(&[3, on, at, 0, 1, 0, 0, 0, 0]),
                            powered(CARD),
                            bytes(&[7, at, 0]),
                        ]
                        .concat()
                    })
                    .collect::<Vec<_>>()
                    .concat(),
            ],
        ),
    ]
}

// ---- usbredir -------------------------------------------------------------------------------------------

fn usbredir() -> Vec<Seed> {
    const CARD: u8 = 14;
    let start = || bytes(&[0, 0, 0, 0]);
    let may_migrate = || bytes(&[0, 0, 0, 2]);
    let configure = || bytes(&[0x0B, 0, 1]);
    let receive = || bytes(&[0x1B, 0, 2]);
    let stop = || bytes(&[0x2B, 0, 3]);
    let reset = || bytes(&[0x3B, 0, 4]);
    let read = |id: u8| bytes(&[7, 0, id, 0]);
    let cancel = |id: u8| bytes(&[10, id]);
    let say = |id: u8, kind: u8, seq: u8, data: Vec<u8>| [&[5, 0, id, kind, 0, seq], &data[..]].concat();
    let control = |id: u8, setup: [u8; 8]| [&[9, id], &setup[..], &[0]].concat();
    let (on, status, xfr) = (0, 2, 3);
    let up_from = |start| {
        [
            start,
            reset(),
            reset(),
            control(8, [0x80, 6, 0, 1, 0, 0, 18, 0]),
            control(9, [0x80, 6, 0, 2, 0, 0, 255, 0]),
            configure(),
            receive(),
            insert(CARD, 0),
            read(10),
            say(11, on, 1, vec![0]),
            powered(CARD),
        ]
        .concat()
    };
    let up = || up_from(start());
    let up_to_migrate = || up_from(may_migrate());
    let hundred_milliseconds = || pass(CARD, 100);
    let apdu = |seq: u8| [read(20 + seq), say(40 + seq, xfr, seq, block(&SELECT))].concat();
    let mut first = [0; 80];
    first[4] = 68;
    first[76] = 0x7E;
    vec![
        ("apdu", vec![up(), apdu(2), response(CARD, &[1; 20]), apdu(3), response_of(CARD, 5000)]),
        (
            "enumeration",
            vec![
                start(),
                (0..10)
                    .map(|kind| control(kind, [0x80, 6, kind, kind & 3, 9, 4, 255, 0]))
                    .collect::<Vec<_>>()
                    .concat(),
            ],
        ),
        (
            "hello-in-pieces",
            vec![
                bytes(&[0, 0, 0, 1, 0]),
                first
                    .chunks(7)
                    .map(|piece| [bytes(&[1]), block(piece)].concat())
                    .collect::<Vec<_>>()
                    .concat(),
            ],
        ),
        (
            "old-peer",
            vec![
                bytes(&[0, 0, 0, 1, 0, 2, 0]),
                [&[4, 6, 0], &block(&[1])[..]].concat(),
                [&[4, 101, 9], &block(&[0x81, 0, 64, 0, 0, 0, 0, 0])[..]].concat(),
            ],
        ),
        ("second-hello", vec![up(), bytes(&[2, 0xFF]), apdu(2)]),
        ("not-hello", vec![bytes(&[0, 0, 0, 1, 0]), read(1), bytes(&[0, 1, 8]), vec![0xFF; 8]]),
        ("cancel", vec![up(), read(50), cancel(50), read(51), cancel(52), cancel(51)]),
        (
            "cancel-crossed",
            vec![up(), apdu(2), response(CARD, &[1, 2, 3]), cancel(22), read(60), cancel(60), read(61)],
        ),
        (
            "cancel-crossed-two",
            vec![
                up(),
                apdu(2),
                response(CARD, &[1]),
                read(62),
                say(63, status, 3, vec![0]),
                cancel(22),
                cancel(62),
                read(64),
                read(65),
            ],
        ),
        (
            "notifications",
            vec![
                up(),
                remove(CARD, 0),
                insert(CARD, 0),
                stop(),
                remove(CARD, 0),
                receive(),
                stop(),
                receive(),
            ],
        ),
        (
            "migration",
            vec![
                up_to_migrate(),
                apdu(2),
                bytes(&[0]),
                response(CARD, &[5; 9]),
                read(70),
                hundred_milliseconds(),
                say(71, status, 3, vec![0]),
                bytes(&[12]),
            ],
        ),
        (
            "migration-in-a-packet",
            vec![
                up_to_migrate(),
                bytes(&[1, 9, 101, 0, 0, 0, 10, 0, 0, 0, 7, 0]),
                bytes(&[0]),
                bytes(&[1, 7, 0, 0, 0, 0, 0, 0, 1]),
                hundred_milliseconds(),
                read(72),
            ],
        ),
        (
            "migration-silent",
            vec![
                up_to_migrate(),
                apdu(2),
                bytes(&[0]),
                bytes(&[0]),
                bytes(&[0x8C]),
                response(CARD, &[5; 9]),
                read(70),
                bytes(&[0x47, 0, 71, 0]),
                bytes(&[12]),
            ],
        ),
        (
            "migration-of-a-guest-that-runs",
            vec![up_to_migrate(), bytes(&[0]), read(70), bytes(&[0x6D]), hundred_milliseconds(), read(71)],
        ),
        ("migration-of-nobody", vec![up_to_migrate(), bytes(&[0]), bytes(&[0x4C]), bytes(&[12])]),
        ("takeover", vec![up(), apdu(2), bytes(&[0]), read(70), response(CARD, &[5; 9]), cancel(22)]),
        ("second-vmm", vec![up(), bytes(&[0, 2, 0xFF]), pass(CARD, 3200), read(70)]),
        (
            "second-vmm-after-the-first",
            vec![up(), bytes(&[0, 2, 0xFF]), bytes(&[0x4C]), configure(), receive()],
        ),
        ("silent-ones", vec![up(), vec![0; 40], bytes(&[0, 2, 0xFF]), bytes(&[0x4C])]),
        ("unacknowledged", vec![up(), read(30), bytes(&[13]), pass(CARD, 1200), bytes(&[0x1D])]),
        (
            "reconnect",
            vec![up(), bytes(&[12]), insert(CARD, 0), bytes(&[0, 2, 0xFF]), configure(), receive()],
        ),
        (
            "unplug",
            vec![up(), read(30), bytes(&[13]), bytes(&[3, 24, 0, 0]), bytes(&[0x1D]), configure(), read(31)],
        ),
        (
            "unplug-at-work",
            vec![up(), apdu(2), bytes(&[13, 0x1D]), response(CARD, &[]), bytes(&[3, 24, 0, 0])],
        ),
        ("rejected", vec![up(), bytes(&[3, 22, 0, 0]), read(32), bytes(&[13, 0x1D])]),
        (
            "reset-at-work",
            vec![up(), apdu(2), read(33), reset(), response(CARD, &[]), configure(), read(34), apdu(3)],
        ),
        (
            "halt",
            vec![
                up(),
                control(1, [2, 3, 0, 0, 0x81, 0, 0, 0]),
                read(35),
                control(2, [2, 1, 0, 0, 0x81, 0, 0, 0]),
                read(36),
                control(3, [2, 3, 0, 0, 0x82, 0, 0, 0]),
                receive(),
            ],
        ),
        (
            "extended",
            vec![
                up(),
                say(41, xfr, 2, long(&[0, 0xDB, 0x3F, 0xFF, 0, 0xFF, 0xFF], 65_535)),
                failed(CARD, 5),
                read(42),
                cancel(42),
                read(43),
            ],
        ),
        ("too-many-waiting", vec![up(), (0..70).map(|id| read(100 + id)).collect::<Vec<_>>().concat()]),
        (
            "every-type",
            vec![
                up(),
                (1..28)
                    .chain(100..106)
                    .map(|kind| [bytes(&[3, kind, kind]), block(&[0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0])].concat())
                    .collect::<Vec<_>>()
                    .concat(),
            ],
        ),
        (
            "answers-expire",
            vec![up(), apdu(2), response(CARD, &[1, 2, 3]), pass(CARD, 40_000), cancel(22), read(66)],
        ),
        (
            "seven-interfaces",
            vec![
                bytes(&[5, 0, 0, 0]),
                configure(),
                (0..7)
                    .map(|at| {
                        [
                            bytes(&[0x1B, at, 2]),
                            bytes(&[7, at, at, 0]),
                            insert(CARD, at),
                            bytes(&[5, at, 9, 2, 0, 1, 0]),
                        ]
                        .concat()
                    })
                    .collect::<Vec<_>>()
                    .concat(),
            ],
        ),
    ]
}

// ---- USB/IP ---------------------------------------------------------------------------------------------

fn usbip() -> Vec<Seed> {
    const CARD: u8 = 13;
    let start = || bytes(&[0, 0, 0, 0]);
    let import = || bytes(&[2, 0]);
    let control = |which: u8| bytes(&[3, which]);
    let read = || bytes(&[8, 1, 0]);
    let say = |kind: u8, seq: u8, data: Vec<u8>| [&[5, 0, kind, 0, seq], &data[..]].concat();
    let unlink = |back: u8| bytes(&[2, back]);
    let (on, status, xfr) = (0, 2, 3);
    let up = || {
        [
            start(),
            import(),
            control(7),
            control(1),
            control(0),
            bytes(&[8, 2, 2]),
            insert(CARD, 0),
            read(),
            say(on, 1, vec![0]),
            powered(CARD),
        ]
        .concat()
    };
    let apdu = |seq: u8| [read(), say(xfr, seq, block(&SELECT))].concat();
    // The kernel's first transfer in the request's last piece.
    let submit = [
        &[0, 0, 0, 1, 0, 0, 0, 100, 0, 1, 0, 1, 0, 0, 0, 1],
        &[0; 8][..],
        &[0, 0, 0, 2],
        &[0; 12],
        &[0x80, 0, 0, 0, 0, 0, 2, 0],
    ]
    .concat();
    let truncated = [
        &[0, 0, 0, 1, 0, 0, 0, 101, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
        &[0, 0, 1, 0][..],
        &[0; 20],
    ]
    .concat();
    vec![
        ("list", vec![start(), bytes(&[1, 0]), bytes(&[1, 0])]),
        ("no-such-device", vec![start(), bytes(&[0xC2, 0]), bytes(&[2, 0])]),
        ("other-version", vec![start(), bytes(&[0, 8, 1, 6, 0x80, 5, 0, 0, 0, 0])]),
        ("other-request", vec![start(), bytes(&[0, 8, 1, 0x11, 0x80, 9, 0, 0, 0, 0])]),
        ("half-request", vec![start(), bytes(&[0, 9, 1, 0x11, 0x80, 3, 0, 0, 0, 0, b'1'])]),
        (
            "two-clients",
            vec![start(), import(), control(0), vec![0xC0, 0, 3], bytes(&[0, 0]), import(), control(0)],
        ),
        ("import-and-more", vec![start(), [&[2], &block(&submit)[..]].concat()]),
        ("apdu", vec![up(), apdu(2), response(CARD, &[1; 20]), apdu(3), response_of(CARD, 5000)]),
        (
            "in-pieces",
            vec![
                start(),
                import(),
                bytes(&[0xC3, 0]),
                insert(CARD, 0),
                bytes(&[0xC8, 1, 0]),
                [&[0xC5, 0, on, 0, 1], &block(&[1; 60])[..]].concat(),
            ],
        ),
        ("unlink-waiting", vec![up(), read(), unlink(1), read(), read(), unlink(2), unlink(2)]),
        ("unlink-answered", vec![up(), apdu(2), response(CARD, &[7]), unlink(2), unlink(9), unlink(0)]),
        (
            "unlink-several",
            vec![
                up(),
                (0..10).map(|_| read()).collect::<Vec<_>>().concat(),
                (0..12).map(|back| unlink(back + 1)).collect::<Vec<_>>().concat(),
            ],
        ),
        (
            "notifications",
            vec![
                up(),
                bytes(&[8, 2, 2]),
                remove(CARD, 0),
                bytes(&[8, 2, 3]),
                insert(CARD, 0),
                bytes(&[8, 2, 1]),
            ],
        ),
        (
            "small-reads",
            vec![
                up(),
                say(xfr, 2, block(&SELECT)),
                response_of(CARD, 200),
                (0..6).map(|_| bytes(&[8, 1, 1])).collect::<Vec<_>>().concat(),
            ],
        ),
        ("configured-at-work", vec![up(), apdu(2), read(), control(0), response(CARD, &[]), apdu(3)]),
        ("halts", vec![up(), control(4), read(), control(3), read(), control(5), say(status, 3, vec![0])]),
        ("abort", vec![up(), apdu(2), control(2), say(4, 1, vec![0]), read()]),
        (
            "extended",
            vec![
                up(),
                say(xfr, 2, long(&[0, 0xDB, 0x3F, 0xFF, 0, 0xFF, 0xFF], 65_535)),
                failed(CARD, 5),
                read(),
                bytes(&[8, 1, 5]),
            ],
        ),
        ("too-many-waiting", vec![up(), (0..70).map(|_| read()).collect::<Vec<_>>().concat()]),
        (
            "same-number",
            vec![up(), bytes(&[1, 200, 0, 1, 1, 64, 0, 0, 0, 0]), bytes(&[1, 200, 0, 1, 1, 64, 0, 0, 0, 0])],
        ),
        ("other-device", vec![up(), bytes(&[1, 200, 255, 1, 1, 64, 0, 0, 0, 0])]),
        (
            "other-endpoint",
            vec![
                up(),
                (0..20).map(|at| bytes(&[1, 200 + at, 0, 0, at, 0, 0, 0, 0, 0])).collect::<Vec<_>>().concat(),
            ],
        ),
        ("half-transfer", vec![up(), [&[0], &block(&truncated)[..]].concat(), read()]),
        (
            "isochronous",
            vec![
                up(),
                [
                    &[0],
                    &block(&[
                        0, 0, 0, 1, 0, 0, 0, 9, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 8,
                        0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                    ])[..],
                ]
                .concat(),
            ],
        ),
        (
            "seven-interfaces",
            vec![
                bytes(&[5, 0, 0, 2]),
                import(),
                control(0),
                (0..7)
                    .map(|at| {
                        [
                            bytes(&[8, 2 * at + 1, 0, 8, 2 * at + 2, 2]),
                            insert(CARD, at),
                            bytes(&[5, at, 2, 0, 1, 0]),
                        ]
                        .concat()
                    })
                    .collect::<Vec<_>>()
                    .concat(),
            ],
        ),
    ]
}

// ---- VSCard ---------------------------------------------------------------------------------------------

fn vscard() -> Vec<Seed> {
    let (client, host, both) = (0, 1, 2);
    let due = || bytes(&[7, 5]);
    // Three replies to zeros, Init, and the reader is taken.
    let error = |code: u8| bytes(&[4, code]);
    let plain = || bytes(&[3, 0]);
    let extended = || bytes(&[3, 1, 0, 0]);
    let inserted = || bytes(&[7, 0, 0]);
    let removed = || bytes(&[7, 0, 3]);
    let up = |init: Vec<u8>| {
        [
            vec![client],
            error(1),
            due(),
            error(1),
            init,
            error(0),
            inserted(),
            due(),
            error(0),
            due(),
            error(0),
        ]
        .concat()
    };
    let apdu = || [&[5], &block(&SELECT)[..]].concat();
    let answer = |data: &[u8]| [&[7, 1, 0, 0, 1], &block(data)[..]].concat();
    let message = |kind: u8, reader: u8, payload: &[u8]| [&[1, kind, reader], &block(payload)[..]].concat();
    // The host's side.
    let atr = || bytes(&[4, 0, 0]);
    let transmit = || [&[7, 0, 0], &block(&[1, 2, 3])[..]].concat();
    let result = |data: &[u8]| [&[5, 1], &block(data)[..]].concat();
    let shown = |init: Vec<u8>| [vec![host], init, message(4, 0, b"reader"), atr()].concat();
    let bring_up = || {
        let more =
            (0..24).map(|_| [bytes(&[7]), bytes(&[2, 5]), bytes(&[7])].concat()).collect::<Vec<_>>().concat();
        [bytes(&[both]), bytes(&[2, 0, 0]), more].concat()
    };
    vec![
        ("client-apdu", vec![up(plain()), apdu(), answer(&[1; 30]), apdu(), answer(&[])]),
        (
            "client-extended",
            vec![
                up(extended()),
                message(9, 0, &[]),
                bytes(&[7, 3, 0, 0]),
                apdu(),
                answer(&[2; 100]),
                message(10, 0, &[]),
            ],
        ),
        ("client-not-answered", vec![up(plain()), apdu(), due(), answer(&[])]),
        (
            "client-removed",
            vec![up(plain()), apdu(), removed(), due(), error(0), due(), inserted(), due(), error(0)],
        ),
        ("client-swapped", vec![up(plain()), apdu(), inserted(), due(), error(0), due(), error(0), apdu()]),
        ("client-leaves", vec![up(plain()), bytes(&[7, 4, 3]), error(0), error(0)]),
        ("client-leaves-unacknowledged", vec![up(plain()), bytes(&[7, 4, 3]), due(), due()]),
        (
            "client-many-commands",
            vec![
                up(plain()),
                (0..20).map(|_| apdu()).collect::<Vec<_>>().concat(),
                (0..20).map(|_| answer(&[])).collect::<Vec<_>>().concat(),
            ],
        ),
        (
            "client-bad-commands",
            vec![up(plain()), message(0, 0, &[0]), message(0, 2, &SELECT), message(0, 0, &[]), apdu()],
        ),
        (
            "client-every-message",
            vec![up(extended()), (0..13).map(|kind| message(kind, 0, &[0; 8])).collect::<Vec<_>>().concat()],
        ),
        (
            "client-misaligned",
            vec![
                vec![client],
                (0..30).map(|_| due()).collect::<Vec<_>>().concat(),
                error(1),
                due(),
                error(1),
                due(),
            ],
        ),
        (
            "client-parked",
            vec![vec![client], (0..320).map(|_| due()).collect::<Vec<_>>().concat(), plain(), error(0)],
        ),
        (
            "client-early-commands",
            vec![vec![client], apdu(), apdu(), error(1), due(), error(1), plain(), error(0)],
        ),
        ("client-refused", vec![vec![client], error(1), due(), error(1), plain(), error(2)]),
        ("client-other-magic", vec![vec![client], message(2, 0, b"XXXX\0\0\0\x02\0\0\0\0")]),
        (
            "client-too-long",
            vec![vec![client], bytes(&[0, 12, 0, 0, 0, 7, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF])],
        ),
        ("client-flush", vec![up(plain()), apdu(), message(7, 0, &[]), answer(&[])]),
        ("host-apdu", vec![shown(plain()), transmit(), result(&[1; 30]), transmit(), result(&[])]),
        (
            "host-extended",
            vec![
                shown(extended()),
                bytes(&[7, 3]),
                bytes(&[4, 1, 0]),
                transmit(),
                result(&[5; 200]),
                bytes(&[7, 4]),
                message(10, 0, &[]),
            ],
        ),
        (
            "host-old-client",
            vec![vec![host], plain(), message(5, 0, &[]), message(4, 0, &[]), atr(), transmit(), result(&[])],
        ),
        ("host-late-answer", vec![shown(plain()), transmit(), due(), transmit(), result(&[1]), result(&[2])]),
        (
            "host-silent",
            vec![shown(plain()), (0..6).map(|_| [transmit(), due()].concat()).collect::<Vec<_>>().concat()],
        ),
        ("host-swapped", vec![shown(plain()), transmit(), atr(), transmit(), result(&[1]), result(&[2])]),
        ("host-removed", vec![shown(plain()), transmit(), message(6, 0, &[]), transmit(), result(&[])]),
        ("host-refused-command", vec![shown(plain()), transmit(), message(1, 0, &[0, 0, 0, 1])]),
        (
            "host-every-message",
            vec![
                shown(extended()),
                (0..13).map(|kind| message(kind, 0, &[0; 4])).collect::<Vec<_>>().concat(),
            ],
        ),
        (
            "host-zeros",
            vec![vec![host], bytes(&[0, 12]), vec![0; 12], bytes(&[0, 11]), vec![0; 11], bytes(&[0, 1, 0])],
        ),
        ("host-occupied", vec![vec![0x90 + host], plain(), message(4, 0, b"reader")]),
        (
            "host-long-command",
            vec![
                shown(plain()),
                bytes(&[7, 0, 1, 0, 4]),
                shown(extended())[1..].to_vec(),
                bytes(&[7, 0, 1, 0, 4]),
            ],
        ),
        (
            "both",
            vec![bring_up(), bytes(&[1, 7]), transmit(), bytes(&[7]), bytes(&[2, 1, 0, 0, 0]), bytes(&[7])],
        ),
        (
            "both-plain",
            vec![vec![0xC2], bring_up()[1..].to_vec(), bytes(&[4, 0, 0]), block(&[1]), bytes(&[7])],
        ),
        (
            "both-tampered",
            vec![bring_up(), bytes(&[6, 1, 8, 0, 0]), bytes(&[4, 3]), bytes(&[6, 1, 3, 0, 1]), bytes(&[7])],
        ),
    ]
}

// ---- an emulated card -------------------------------------------------------------------------------------

const DUAL: [u8; 2] = [0, 0];
const OPEN_PIV: [u8; 2] = [1, 1];
const OWN_PIV: [u8; 2] = [1, 2];
const CAC: [u8; 2] = [2, 0];
const OWN_CAC: [u8; 2] = [2, 2];
const WRITABLE: [u8; 2] = [3, 2];

/// No byte of a template changed.
const AS_IT_IS: [u8; 2] = [0, 0];

/// What happens while the command is worked on that this step has.
fn meanwhile(what: u8, mut step: Vec<u8>) -> Vec<u8> {
    step[0] += 16 * what;
    step
}

/// CHANGE REFERENCE DATA of PIN (0), PUK (1), a CAC's PIN (3); RESET RETRY COUNTER of PIV (2), of a CAC (4): right
/// at first (0) or not, and the number of the new one.
fn change(what: u8, wrong: u8, new: u8) -> Vec<u8> {
    vec![7, what, wrong, new]
}

fn apdu(apdu: &[u8]) -> Vec<u8> {
    [&[0], &block(apdu)[..]].concat()
}

/// VERIFY with the right PIN, 0 for PIV and 1 for a CAC.
fn pin(applet: u8) -> Vec<u8> {
    vec![3, applet]
}

fn get_response(le: u8) -> Vec<u8> {
    vec![4, le]
}

/// GENERAL AUTHENTICATE: not the last of a chain?, algorithm, key, tag (by number), value.
fn authenticate(piece: u8, algorithm: u8, key: u8, tag: u8, value: &[u8]) -> Vec<u8> {
    [&[2, piece, algorithm, key, tag], &block(value)[..], &AS_IT_IS].concat()
}

/// Authentication of the administrator: by a challenge (0) or mutual (1); rightly (0) or not; so much of the answer
/// in a piece of its own; which byte of it is changed, and how.
fn administrator(way: u8, wrong: u8, cut: u8, change: [u8; 2]) -> Vec<u8> {
    [&[8, way, wrong, cut], &change[..]].concat()
}

/// PUT DATA: the last of a chain (0) or not (3), object (by number), content, and what is changed.
fn put(piece: u8, tag: u8, content: &[u8], change: [u8; 2]) -> Vec<u8> {
    [&[10, piece, tag], &block(content)[..], &change].concat()
}

/// GENERATE ASYMMETRIC KEY PAIR: key, algorithm, Le (by number), and what is changed.
fn generate(key: u8, algorithm: u8, le: u8, change: [u8; 2]) -> Vec<u8> {
    [&[13, key, algorithm, le], &change[..]].concat()
}

fn object(tag: &[u8], le: u8) -> Vec<u8> {
    let length = tag.len() as u8;
    apdu(&[&[0x00, 0xCB, 0x3F, 0xFF, length + 2, 0x5C, length], tag, &[le]].concat())
}

fn select_application(aid: &[u8]) -> Vec<u8> {
    apdu(&[&[0x00, 0xA4, 0x04, 0x00, aid.len() as u8], aid, &[0x00]].concat())
}

fn card() -> Vec<Seed> {
    let (logout, reset) = (vec![5], vec![6]);
    let piv = select_application(&[0xA0, 0x00, 0x00, 0x03, 0x08, 0x00, 0x00, 0x10, 0x00]);
    let pki = select_application(&[0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, 0x00]);
    let certificate = [0x5F, 0xC1, 0x05];
    let point = |coordinate: usize| [&[0x04], &vec![9; 2 * coordinate][..]].concat();
    let raw = [&[0x7C, 0x81, 0x85, 0x82, 0x00, 0x81, 0x81, 0x80][..], &[1; 128]].concat();
    let piece = |class: u8, data: &[u8]| apdu(&[&[class, 0x87, 0x06, 0x9A, data.len() as u8], data].concat());
    let verify =
        |reference: u8, body: &[u8]| apdu(&[&[0x00, 0x20, 0x00, reference, body.len() as u8], body].concat());
    vec![
        ("rsa", vec![DUAL.into(), pin(0), authenticate(0, 0, 0, 0, &[1; 128]), get_response(0)]),
        ("rsa-unverified", vec![DUAL.into(), authenticate(0, 0, 0, 0, &[1; 128])]),
        (
            "chain",
            vec![DUAL.into(), pin(0), piece(0x10, &raw[..100]), piece(0x00, &raw[100..]), get_response(8)],
        ),
        (
            "chain-broken",
            vec![DUAL.into(), pin(0), piece(0x10, &raw[..100]), pin(0), piece(0x00, &raw[100..])],
        ),
        (
            "chain-long",
            vec![DUAL.into(), [&[1, 2, 0x87, 6, 0x9A, 0], &long(&[0x7C], 8000)[..]].concat(), piece(0, &raw)],
        ),
        (
            "signature-key",
            vec![
                DUAL.into(),
                pin(0),
                authenticate(0, 0, 1, 0, &[1; 128]),
                authenticate(0, 0, 1, 0, &[1; 128]),
                logout.clone(),
            ],
        ),
        (
            "ecdsa",
            vec![DUAL.into(), pin(0), authenticate(0, 1, 2, 0, &[0x80; 32]), authenticate(0, 1, 2, 0, &[1])],
        ),
        (
            "ecdh",
            vec![
                DUAL.into(),
                pin(0),
                authenticate(0, 1, 2, 1, &point(32)),
                authenticate(0, 2, 3, 1, &point(48)),
            ],
        ),
        (
            "card-authentication",
            vec![OPEN_PIV.into(), authenticate(0, 2, 3, 0, &[3; 48]), authenticate(0, 0, 0, 0, &[1; 128])],
        ),
        ("random", vec![OPEN_PIV.into(), apdu(&[0x00, 0x87, 0x00, 0x9B, 4, 0x7C, 2, 0x81, 0, 0])]),
        (
            "failures",
            vec![
                DUAL.into(),
                pin(0),
                authenticate(0, 0, 0, 0, &[0xED; 128]),
                authenticate(0, 0, 0, 0, &[0xEE; 128]),
                authenticate(0, 0, 0, 0, &[1; 128]),
            ],
        ),
        (
            "objects",
            vec![
                OPEN_PIV.into(),
                object(&[0x7E], 8),
                get_response(12),
                object(&certificate, 0),
                get_response(0),
                object(&[0x5F, 0xC1, 0x09], 0),
                object(&[0x7F, 0x61], 0),
            ],
        ),
        (
            "wrong-pin",
            vec![
                DUAL.into(),
                pin(0),
                verify(0x80, b"12345678"),
                verify(0x80, b"123456"),
                apdu(&[0x00, 0x20, 0x00, 0x80]),
                apdu(&[0x00, 0x20, 0xFF, 0x80]),
            ],
        ),
        (
            "change",
            vec![
                OWN_PIV.into(),
                change(0, 0, 1),
                pin(0),
                change(1, 0, 2),
                change(0, 1, 0),
                change(0, 1, 0),
                change(0, 1, 0),
                change(0, 0, 0),
                change(2, 1, 0),
                change(2, 0, 0),
                pin(0),
                authenticate(0, 0, 1, 0, &[1; 128]),
                change(0, 0, 3),
            ],
        ),
        ("change-no-verify", vec![OWN_PIV.into(), change(0, 0, 1), authenticate(0, 0, 1, 0, &[1; 128])]),
        (
            "change-after-logout",
            vec![
                OWN_PIV.into(),
                pin(0),
                logout.clone(),
                change(0, 0, 1),
                authenticate(0, 0, 1, 0, &[1; 128]),
            ],
        ),
        ("change-not", vec![DUAL.into(), pin(0), change(2, 0, 1), change(1, 0, 2), change(0, 0, 1)]),
        (
            "change-cac",
            vec![OWN_CAC.into(), change(3, 0, 2), change(3, 0, 3), change(4, 0, 0), change(4, 1, 0), pin(1)],
        ),
        (
            "puk-blocked",
            vec![OWN_PIV.into(), pin(0), change(1, 1, 0), change(2, 1, 0), change(2, 1, 0), change(2, 0, 0)],
        ),
        (
            "reset-at-work",
            vec![
                OWN_PIV.into(),
                meanwhile(3, pin(0)),
                pin(0),
                meanwhile(3, authenticate(0, 0, 0, 0, &[1; 128])),
                pin(0),
                meanwhile(3, change(0, 0, 1)),
                pin(0),
                meanwhile(3, change(2, 0, 0)),
                pin(0),
            ],
        ),
        (
            "late",
            vec![
                DUAL.into(),
                meanwhile(4, pin(0)),
                pin(0),
                meanwhile(4, authenticate(0, 0, 1, 0, &[1; 128])),
                authenticate(0, 0, 1, 0, &[1; 128]),
                apdu(&[0x00, 0x20, 0x00, 0x80]),
            ],
        ),
        (
            "two-at-once",
            vec![
                DUAL.into(),
                meanwhile(1, pin(0)),
                meanwhile(1, authenticate(0, 0, 1, 0, &[1; 128])),
                meanwhile(2, authenticate(0, 0, 0, 0, &[1; 128])),
                meanwhile(2, pin(0)),
                pin(0),
                meanwhile(5, authenticate(0, 0, 0, 0, &[1; 128])),
            ],
        ),
        (
            "administrator",
            vec![
                WRITABLE.into(),
                put(0, 0, b"refused", AS_IT_IS),
                administrator(0, 0, 0, AS_IT_IS),
                put(0, 0, b"certificate", AS_IT_IS),
                object(&certificate, 0),
                administrator(1, 0, 7, AS_IT_IS),
                put(0, 0, b"", AS_IT_IS),
                object(&certificate, 0),
                logout.clone(),
                generate(0, 0, 2, AS_IT_IS),
            ],
        ),
        (
            "administrator-wrong",
            vec![
                WRITABLE.into(),
                administrator(0, 1, 0, AS_IT_IS),
                generate(0, 0, 2, AS_IT_IS),
                administrator(1, 0, 0, [1, 1]),
                put(0, 0, b"refused", AS_IT_IS),
                apdu(&[0x00, 0x87, 0x00, 0x9B, 4, 0x7C, 2, 0x81, 0, 4]),
                get_response(0),
                apdu(&[0x00, 0x87, 0x00, 0x9B, 12, 0x7C, 10, 0x82, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0]),
            ],
        ),
        (
            "put",
            vec![
                WRITABLE.into(),
                administrator(0, 0, 0, AS_IT_IS),
                put(3, 1, &[1; 200], AS_IT_IS),
                apdu(&[0x00, 0xDB, 0x3F, 0xFF, 0]),
                put(0, 3, b"retired", AS_IT_IS),
                object(&[0x5F, 0xC1, 0x0C], 0),
                put(0, 5, b"discovery", AS_IT_IS),
                put(0, 0, b"tag", [0, 1]),
                put(0, 0, b"length", [1, 0x80]),
                put(0, 0, b"length", [7, 1]),
                apdu(&[0x00, 0xDB, 0x3F, 0xFF, 4, 0x5C, 0, 0x53, 0]),
                apdu(&[0x00, 0xDB, 0x3F, 0xFF, 5, 0x5C, 3, 0x5F, 0xC1, 5]),
                meanwhile(3, put(0, 2, b"reset", AS_IT_IS)),
                [&[1, 2, 0xDB, 0x3F, 0xFF, 0], &long(&[0x5C, 3], 65_000)[..]].concat(),
            ],
        ),
        (
            "generate",
            vec![
                WRITABLE.into(),
                administrator(0, 0, 0, AS_IT_IS),
                generate(0, 0, 1, AS_IT_IS),
                get_response(0),
                authenticate(0, 1, 0, 0, &[3; 32]),
                pin(0),
                authenticate(0, 1, 0, 0, &[3; 32]),
                generate(5, 3, 3, AS_IT_IS),
                generate(6, 0, 2, AS_IT_IS),
                generate(1, 6, 2, AS_IT_IS),
                generate(1, 0, 2, [1, 0x80]),
                apdu(&[0x00, 0x47, 0x00, 0x9A, 4, 0xAC, 2, 0x80, 0, 0]),
                apdu(&[0x00, 0x47, 0x00, 0x9A, 2, 0xAC, 0, 0]),
                meanwhile(4, generate(3, 1, 2, AS_IT_IS)),
                generate(3, 1, 2, AS_IT_IS),
            ],
        ),
        ("select", vec![DUAL.into(), pin(0), pki.clone(), pin(1), piv, pin(0), pki.clone(), reset.clone()]),
        (
            "cac-unverified",
            vec![
                OWN_CAC.into(),
                pki.clone(),
                apdu(&[&[0x00, 0x42, 0x00, 0x00, 128], &[5; 128][..], &[0x00]].concat()),
            ],
        ),
        (
            "cac",
            vec![
                CAC.into(),
                pin(1),
                select_application(&[0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, 0x00]),
                apdu(&[0x80, 0x52, 0x00, 0x00, 0x02, 0x02, 0xF0, 0xF0]),
                apdu(&[0x00, 0x56, 0x01, 0x00, 0x00]),
                apdu(&[&[0x00, 0x42, 0x80, 0x00, 100], &[5; 100][..]].concat()),
                apdu(&[&[0x00, 0x42, 0x00, 0x00, 28], &[5; 28][..], &[0x00]].concat()),
                reset,
            ],
        ),
    ]
}

// ---- option strings ---------------------------------------------------------------------------------------

fn options() -> Vec<Seed> {
    let text = |text: &str| vec![text.as_bytes().to_vec()];
    vec![
        ("endpoint-tcp", text("tcp:localhost:2001")),
        ("endpoint-tcp6", text("tcp:[::1]:2001")),
        ("endpoint-brackets", text("tcp:[[a]]:2001")),
        ("endpoint-tcp-listen", text("tcp-listen:127.0.0.1:0")),
        ("endpoint-unix", text("unix:/run/a,,b.sock")),
        ("endpoint-unix-listen", text("unix-listen:/run/vm1.sock,option")),
        ("vpcd", text("vpcd:localhost:35963,slot=1")),
        ("vpcd-short", text("vpcd:")),
        ("vpcd-high", text("vpcd:[::1]:65535,slot=65535")),
        ("profile", text("dual")),
        ("slot", text("9a")),
        ("slot-retired", text("95")),
        ("wanted", text("9e=CN=Jane, Doe")),
        ("pem", text("a,,b.crt,a,,b.key")),
        (
            "legacy",
            text("db=\"sql:/d b\" use_hw=no soft=(,Virtual Reader,CAC,,id,sign,) hw_type=CAC hw_params=x"),
        ),
        ("legacy-hardware", text("nssemul use_hw=yes, db= \"/d\"")),
        ("reader", text("usbredir,interfaces=7,speed=high,id=04E6:5116,serial=1,product=P,unix:/run/a.sock")),
        (
            "reader-usbip",
            text("usbip,slots=16,speed=full,max-message=65554,manufacturer=,,,tcp-listen:[::]:3240"),
        ),
        (
            "card-database",
            text(
                "cert,db=sql:/d,,x,cert=a,cert=9c=b,profile=piv,card-name=c,pin-file=p,puk-file=q,slot=2,reader=1",
            ),
        ),
        (
            "card-files",
            text("host-certificates,pem=a.crt,,a.key,p12=b.p12,password-file=w,no-pin,forget-pin=60"),
        ),
        ("card-token", text("host,module=/m.so,db=/d,token=t,keep-tries=15,forget-pin=18446744073709551615")),
        ("card-raw", text("pcsc,name=Yubico*,exclusive,keep-tries=0")),
        ("card-passthru", text("passthrough,deadline=3600,reader=1,unix-listen:/run/a,,b.sock")),
        (
            "toml-pem",
            text("name = \"J\"\nprofile = \"piv\"\n[[pem]]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n"),
        ),
        (
            "toml-nss",
            text(
                "name = 'J'\nprofile = 'cac'\n[nss]\ndatabase = 'd'\npassword_file = 'p'\ncertificates = ['a', 'b']\n",
            ),
        ),
    ]
}
