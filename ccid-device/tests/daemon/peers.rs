//! Who says nothing keeps nobody out, and nobody comes in who may not.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;

use rustix::fs::inotify;
use serde_json::Value;

use super::{Daemon, NEVER, Place};

/// As many as come before the one that wants something.
const SILENT: usize = 200;

/// OP_REQ_IMPORT of the first device.
pub(crate) fn import() -> Vec<u8> {
    let mut request = vec![1, 0x11, 0x80, 3, 0, 0, 0, 0, b'1', b'-', b'1'];
    request.resize(40, 0);
    request
}

/// VSCard's ATR message, or CardRemove if there is none.
pub(crate) fn card(atr: &[u8]) -> Vec<u8> {
    let kind = if atr.is_empty() { 6_u32 } else { 5 };
    let header = [kind, 0, atr.len() as u32].into_iter().flat_map(u32::to_be_bytes);
    header.chain(atr.iter().copied()).collect()
}

/// With a USB/IP server at `usbip`.
pub(crate) fn usbip(place: &Place) -> Daemon {
    let mut command = place.daemon(&[]);
    command.arg("--reader").arg(format!("usbip,unix-listen:{}", place.path("usbip").display()));
    started(command)
}

/// With a card that a client brings to `card`, and a control socket.
pub(crate) fn passthru(place: &Place) -> Daemon {
    let card = format!("passthru,unix-listen:{}", place.path("card").display());
    started(place.daemon(&[card]))
}

fn started(mut command: Command) -> Daemon {
    command.env("RUST_BACKTRACE", "1");
    let (daemon, _) = Daemon::start(command);
    daemon.line("ready");
    daemon
}

fn connect(place: &Place, name: &str) -> UnixStream {
    let stream = UnixStream::connect(place.path(name)).unwrap();
    stream.set_read_timeout(Some(NEVER)).unwrap();
    stream
}

fn silent(place: &Place, name: &str) -> Vec<UnixStream> {
    (0..SILENT).map(|_| connect(place, name)).collect()
}

/// Whether the other end has closed it. What was sent before is passed over.
fn is_closed(mut stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    loop {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(_) => return true,
        }
    }
}

#[test]
fn a_usbip_client_gets_in_past_silent_ones() {
    let place = Place::new();
    let _daemon = usbip(&place);
    let before = silent(&place, "usbip");
    let mut client = connect(&place, "usbip");
    client.write_all(&import()).unwrap();
    let mut reply = [0; 320];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..8], [1, 0x11, 0, 3, 0, 0, 0, 0]);
    // The newest of them keep their places.
    assert!(is_closed(&before[0]) && !is_closed(&before[SILENT - 1]));
    // Who has the device is not choosing any more, and keeps it.
    let _after = silent(&place, "usbip");
    let mut other = connect(&place, "usbip");
    // OP_REQ_DEVLIST.
    other.write_all(&[1, 0x11, 0x80, 5, 0, 0, 0, 0]).unwrap();
    let mut list = [0; 12];
    other.read_exact(&mut list).unwrap();
    assert_eq!(list[8..], [0; 4], "devices that are free");
    assert!(!is_closed(&client));
}

struct Control(BufReader<UnixStream>);

impl Control {
    fn new(place: &Place) -> Self {
        let mut control = Self(BufReader::new(connect(place, "control")));
        assert!(control.line()["ccid-device"]["version"].is_string());
        control
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn query(&mut self) -> Value {
        self.0.get_mut().write_all(b"{\"execute\": \"query-readers\"}\n").unwrap();
        self.line()["return"].take()
    }
}

#[test]
fn a_command_is_heard_past_silent_clients() {
    let place = Place::new();
    let mut command = place.daemon(&[]);
    command.arg("--control").arg(format!("unix-listen:{}", place.path("control").display()));
    let _daemon = started(command);
    let listeners = silent(&place, "control");
    let mut client = Control::new(&place);
    assert_eq!(client.query()[0]["carrier"], "usbredir");
    assert!(is_closed(&listeners[0]) && !is_closed(&listeners[SILENT - 1]));
    // Who has said something is not thrown out by those who do not.
    let _more = silent(&place, "control");
    let mut other = Control::new(&place);
    assert!(other.query().is_array() && client.query().is_array());
    // But those who have said something keep nobody out either.
    let others = (0..20).map(|_| Control::new(&place)).map(|mut other| (other.query(), other));
    assert!(others.collect::<Vec<_>>().iter().all(|(answer, _)| answer.is_array()));
}

#[test]
fn a_client_brings_its_card_past_silent_ones() {
    let place = Place::new();
    let daemon = passthru(&place);
    let before = silent(&place, "card");
    let mut client = connect(&place, "card");
    client.write_all(&card(&[0x3B, 0x00])).unwrap();
    // Error 0 for reader 0.
    let mut reply = [0xFF; 16];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(reply, [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]);
    daemon.line("card inserted");
    assert!(is_closed(&before[0]));
    // Nobody takes its place now, whether it speaks or not.
    let _after = silent(&place, "card");
    let mut other = connect(&place, "card");
    let _ = other.write_all(&card(&[0x3B, 0x00]));
    let mut told = Vec::new();
    let _ = other.read_to_end(&mut told);
    assert!(told != reply, "a second card was taken");
    client.write_all(&card(&[])).unwrap();
    client.read_exact(&mut reply).unwrap();
    daemon.line("card removed");
}

#[test]
fn no_socket_is_ever_open_to_others() {
    let place = Place::new();
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::ATTRIB | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, place.0.path(), events).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "umask 0; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_ccid-device")]);
    let at = |name: &str| format!("unix-listen:{}", place.path(name).display());
    command.args(["--reader", &format!("usbredir,{}", at("reader"))]);
    command.args(["--reader", &format!("usbip,{}", at("usbip"))]);
    command.args(["--card", &format!("passthru,{}", at("card")), "--control", &at("control")]);
    let _daemon = started(command);
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let mut made = Vec::new();
    while let Ok(event) = events.next() {
        // What it was made with it has: nothing has changed its mode.
        assert!(event.events().contains(inotify::ReadFlags::CREATE), "{event:?}");
        made.push(event.file_name().unwrap().to_str().unwrap().to_owned());
    }
    made.sort();
    assert_eq!(made, ["card", "control", "reader", "usbip"]);
    for name in made {
        let mode = std::fs::metadata(place.path(&name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}
