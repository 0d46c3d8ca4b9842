//! Sessions against a model of `vhci-hcd`: what it demands of a server, it demands here.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vscard_protocol::{Atr, Response, StatusWord};

use super::DecodeError;
use super::codec::{HEADER, MAX_TRANSFER};
use super::management::{self, Export, Management};
use super::urbs::{CloseReason, Input, Notice, Output, Urbs};
use crate::{Action, Device, DeviceConfig, Layout, Outcome, SlotId, Speed};

/// Bytes from hexadecimal digits; spaces are skipped.
pub(super) fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

// ---- before the import ----------------------------------------------------------------------------------

fn exports() -> Vec<Export> {
    let two = DeviceConfig { layout: Layout::Interfaces(2), speed: Speed::Full, ..DeviceConfig::new("b") };
    vec![
        Export::new(1, Device::new(DeviceConfig::new("a")).unwrap().topology()),
        Export::new(2, Device::new(two).unwrap().topology()),
    ]
}

/// What a connection does when a request comes in pieces, and what it leaves.
fn ask(request: &[u8], cut: usize, exports: &[Export]) -> (Vec<management::Output>, Vec<u8>) {
    let mut connection = Management::new(Instant::now());
    let mut left = Vec::new();
    for mut piece in request.chunks(cut.max(1)) {
        connection.handle(&mut piece, exports, Instant::now());
        left.extend_from_slice(piece);
    }
    (std::iter::from_fn(|| connection.poll_output()).collect(), left)
}

fn import_request(busid: &str) -> Vec<u8> {
    let mut request = unhex("0111 8003 00000000");
    request.extend_from_slice(busid.as_bytes());
    request.resize(40, 0);
    request
}

/// The record of device 1-1, from the field list of the protocol.
fn first_record() -> Vec<u8> {
    let mut record = b"/sys/devices/ccid-device/usb1/1-1".to_vec();
    record.resize(256, 0);
    record.extend_from_slice(b"1-1");
    record.resize(288, 0);
    record.extend(unhex("00000001 00000001 00000003 08e6 4433 0100 00 00 00 01 01 01"));
    record
}

#[test]
fn the_list_has_every_free_device_with_its_interfaces() {
    let mut exports = exports();
    let (outputs, _) = ask(&unhex("0111 8005 00000000"), 100, &exports);
    let [management::Output::Send(reply), management::Output::Close(management::CloseReason::Listed)] =
        &outputs[..]
    else {
        panic!("{outputs:?}");
    };
    assert_eq!(reply[..12], unhex("0111 0005 00000000 00000002"));
    assert_eq!(reply[12..324], first_record());
    assert_eq!(reply[324..328], unhex("0b000000"));
    let second = &reply[328..];
    assert_eq!(second.len(), 312 + 2 * 4);
    assert_eq!(second[288..312], unhex("00000001 00000002 00000002 08e6 4433 0100 00 00 00 01 01 02"));
    assert_eq!(second[312..], unhex("0b000000 0b000000"));

    exports[0].set_imported(true);
    let (outputs, _) = ask(&unhex("0111 8005 00000000"), 3, &exports);
    let management::Output::Send(reply) = &outputs[0] else { panic!("{outputs:?}") };
    assert_eq!(reply[..12], unhex("0111 0005 00000000 00000001"));
    assert_eq!(reply[12 + 256..12 + 260], *b"1-2\0");
}

#[test]
fn a_device_is_imported() {
    let exports = exports();
    let mut request = import_request("1-1");
    request.extend_from_slice(b"first URB");
    for cut in [1, 7, 8, 40, 100] {
        let (outputs, left) = ask(&request, cut, &exports);
        let [management::Output::Send(reply), management::Output::Import(0)] = &outputs[..] else {
            panic!("{outputs:?}");
        };
        assert_eq!(reply[..8], unhex("0111 0003 00000000"));
        assert_eq!(reply[8..], first_record());
        assert_eq!(left, b"first URB");
    }
}

#[test]
fn a_device_that_another_has_is_had_if_that_one_is_gone() {
    let (mut exports, start) = (exports(), Instant::now());
    let mut request = import_request("1-1");
    request.extend_from_slice(b"first URB");
    exports[0].set_imported(true);
    let wait = || {
        let mut connection = Management::new(start);
        let mut received = &request[..];
        connection.handle(&mut received, &exports, start + Duration::from_secs(29));
        assert_eq!(connection.poll_output(), Some(management::Output::Ask(0)));
        assert!(connection.is_waiting() && received == b"first URB");
        // Another device became free.
        connection.handle(&mut received, &exports, start + Duration::from_secs(30));
        assert_eq!((connection.poll_output(), received), (None, &b"first URB"[..]));
        connection
    };
    let mut lucky = wait();
    let mut unlucky = wait();
    let deadline = unlucky.next_deadline().unwrap();
    assert_eq!(deadline, start + Duration::from_secs(32));
    unlucky.handle_deadline(deadline - Duration::from_millis(1));
    assert_eq!(unlucky.poll_output(), None);
    unlucky.handle_deadline(deadline);
    let outputs: Vec<_> = std::iter::from_fn(|| unlucky.poll_output()).collect();
    assert_eq!(outputs[0], management::Output::Send(unhex("0111 0003 00000002")));
    assert_eq!(outputs[1], management::Output::Close(management::CloseReason::Busy("1-1".into())));
    assert!(!unlucky.is_waiting() && unlucky.next_deadline().is_none());

    exports[0].set_imported(false);
    lucky.handle(&mut &[][..], &exports, start + Duration::from_secs(30));
    assert!(matches!(lucky.poll_output(), Some(management::Output::Send(reply)) if reply[4..8] == [0; 4]));
    assert_eq!(lucky.poll_output(), Some(management::Output::Import(0)));
    assert!(!lucky.is_waiting() && lucky.next_deadline().is_none());
}

/// Nothing but a RET_UNLINK is borne by `vhci-hcd` when it asked for nothing.
#[test]
fn a_client_is_asked_by_what_it_ignores() {
    let mut vhci = Vhci::powered(Layout::Slots(1));
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.settle();
    vhci.input(Input::AskPeer);
    let mut expected = unhex("00000004 00000000");
    expected.resize(HEADER, 0);
    assert_eq!(std::mem::take(&mut vhci.to_client), expected);
    vhci.xfr(1, &echo(1, &[1]).0);
    vhci.settle();
    vhci.card_works();
    assert_eq!(vhci.completion(read), done(&echo(1, &[1]).1));
}

#[test]
fn what_cannot_be_had_is_refused_with_the_reason() {
    let exports = exports();
    let refused = |request: &[u8]| {
        let (outputs, _) = ask(request, 100, &exports);
        let [management::Output::Send(reply), management::Output::Close(reason)] = &outputs[..] else {
            panic!("{outputs:?}");
        };
        (reply.clone(), reason.to_string())
    };
    let reply = unhex("0111 0003 00000004");
    assert_eq!(refused(&import_request("1-3")), (reply.clone(), "there is no device \"1-3\"".into()));
    assert_eq!(refused(&import_request(&"1".repeat(32))).0, reply);
    assert_eq!(refused(&import_request("1-1\n")).1, "there is no device \"1-1\\n\"");
    assert_eq!(
        refused(&unhex("0106 8003 00000000")),
        (unhex("0111 0003 00000001"), "version at offset 0 of the request is 0x0106, expected 0x0111".into())
    );
    assert_eq!(
        refused(&unhex("0111 8006 00000000")),
        (
            unhex("0111 0006 00000001"),
            "code at offset 2 of the request is 0x8006, neither DEVLIST nor IMPORT".into()
        )
    );
}

#[test]
fn a_client_that_asks_for_nothing_is_sent_away() {
    let start = Instant::now();
    let mut connection = Management::new(start);
    connection.handle(&mut &import_request("1-1")[..39], &exports(), start);
    assert_eq!(connection.poll_output(), None);
    let deadline = connection.next_deadline().unwrap();
    connection.handle_deadline(deadline - Duration::from_millis(1));
    assert_eq!(connection.poll_output(), None);
    connection.handle_deadline(deadline);
    assert_eq!(connection.poll_output(), Some(management::Output::Close(management::CloseReason::TimedOut)));
    assert_eq!(connection.next_deadline(), None);
    connection.handle(&mut &[0][..], &exports(), start);
    assert_eq!(connection.poll_output(), None);
}

// ---- transfers ------------------------------------------------------------------------------------------

const BULK_OUT: u8 = 0x01;
const BULK_IN: u8 = 0x81;
const INTERRUPT: u8 = 0x82;

/// What libccid reads with: room for the longest message, and two bytes.
const READ: u32 = 65_556;

/// What became of a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Completion {
    status: i32,
    data: Vec<u8>,
    /// By the RET_UNLINK, not by a RET_SUBMIT.
    unlinked: bool,
}

struct Submitted {
    is_in: bool,
    length: u32,
}

/// A client's kernel, the stream in both directions, the server, and a card that says what it is told.
struct Vhci {
    devid: u32,
    server: Urbs,
    device: Device,
    now: Instant,
    seqnum: u32,
    /// Sent, but not yet received by the server, and the other way.
    to_server: Vec<u8>,
    to_client: Vec<u8>,
    submitted: HashMap<u32, Submitted>,
    /// The sequence numbers of UNLINKs and what they are to take back.
    unlinks: HashMap<u32, u32>,
    completed: HashMap<u32, Completion>,
    /// RET_UNLINKs that came too late for their transfer.
    late: u32,
    notices: Vec<Notice>,
    closed: Option<CloseReason>,
    actions: Vec<Action>,
}

impl Vhci {
    fn new(layout: Layout) -> Self {
        let device = Device::new(DeviceConfig { layout, ..DeviceConfig::new("serial") }).unwrap();
        let export = Export::new(2, device.topology());
        Self {
            devid: 0x0001_0002,
            server: Urbs::new(&export),
            device,
            now: Instant::now(),
            seqnum: 0,
            to_server: vec![],
            to_client: vec![],
            submitted: HashMap::new(),
            unlinks: HashMap::new(),
            completed: HashMap::new(),
            late: 0,
            notices: vec![],
            closed: None,
            actions: vec![],
        }
    }

    fn send_header(&mut self, words: [u32; 10], setup: [u8; 8]) {
        self.to_server.extend_from_slice(&words.map(u32::to_be_bytes).concat());
        self.to_server.extend_from_slice(&setup);
    }

    /// Submits without waiting for anything; the direction is the address's.
    fn submit(&mut self, address: u8, length: u32, setup: [u8; 8], data: &[u8]) -> u32 {
        self.seqnum += 1;
        let is_in = address & 0x80 != 0;
        let words =
            [1, self.seqnum, self.devid, u32::from(is_in), u32::from(address & 0x7F), 0x200, length, 0, 0, 0];
        self.send_header(words, setup);
        self.to_server.extend_from_slice(data);
        self.submitted.insert(self.seqnum, Submitted { is_in, length });
        self.seqnum
    }

    fn submit_in(&mut self, address: u8, length: u32) -> u32 {
        self.submit(address, length, [0; 8], &[])
    }

    fn submit_out(&mut self, data: &[u8]) -> u32 {
        self.submit(BULK_OUT, data.len() as u32, [0; 8], data)
    }

    fn unlink(&mut self, target: u32) -> u32 {
        self.seqnum += 1;
        self.send_header([2, self.seqnum, self.devid, 0, 0, target, 0, 0, 0, 0], [0; 8]);
        self.unlinks.insert(self.seqnum, target);
        self.seqnum
    }

    /// The first `count` bytes reach the server.
    fn receive(&mut self, count: usize) {
        let count = count.min(self.to_server.len());
        let bytes: Vec<u8> = self.to_server.drain(..count).collect();
        self.input(Input::Received(&bytes));
    }

    fn input(&mut self, input: Input<'_>) {
        self.server.handle(input, &mut self.device, self.now);
        while let Some(output) = self.server.poll_output() {
            assert!(self.closed.is_none(), "output after Close: {output:?}");
            match output {
                Output::Send(bytes) => self.to_client.extend_from_slice(bytes.expose()),
                Output::Notice(notice) => self.notices.push(notice),
                Output::Close(reason) => self.closed = Some(reason),
            }
        }
        self.actions.extend(std::iter::from_fn(|| self.device.poll_action()));
    }

    /// What the server sent reaches the client, which is as strict as the kernel.
    fn deliver(&mut self) {
        let mut bytes = std::mem::take(&mut self.to_client);
        while !bytes.is_empty() {
            let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
            let (command, seqnum, status) = (word(0), word(4), word(0x14) as i32);
            assert_eq!(bytes[8..0x14], [0; 12]);
            let mut rest = HEADER;
            match command {
                3 => {
                    let sent = self.submitted.remove(&seqnum);
                    let sent = sent.unwrap_or_else(|| panic!("cannot find a urb of seqnum {seqnum}"));
                    let actual = word(0x18);
                    assert!(actual <= sent.length, "{actual} > {}", sent.length);
                    assert!(word(0x20) == 0 && word(0x24) == 0);
                    rest += if sent.is_in { actual as usize } else { 0 };
                    let data = bytes[HEADER..rest].to_vec();
                    self.completed.insert(seqnum, Completion { status, data, unlinked: false });
                }
                4 => {
                    let target = self.unlinks.remove(&seqnum).expect("an UNLINK that is waiting");
                    if self.submitted.remove(&target).is_some() {
                        assert_eq!(status, -104, "a transfer was taken back without being told so");
                        let completion = Completion { status, data: vec![], unlinked: true };
                        self.completed.insert(target, completion);
                    } else {
                        assert_eq!(status, 0);
                        self.late += 1;
                    }
                }
                other => panic!("reply {other}"),
            }
            bytes.drain(..rest);
        }
    }

    /// Everything reaches everybody.
    fn settle(&mut self) {
        self.receive(usize::MAX);
        self.deliver();
    }

    fn completion(&mut self, seqnum: u32) -> Completion {
        self.settle();
        self.completed.get(&seqnum).cloned().unwrap_or_else(|| panic!("URB {seqnum} is not complete"))
    }

    fn control_in(&mut self, setup: &str, length: u32) -> Completion {
        let seqnum = self.submit(0x80, length, unhex(setup).try_into().unwrap(), &[]);
        self.completion(seqnum)
    }

    fn control_out(&mut self, setup: &str, data: &[u8]) -> Completion {
        let setup = unhex(setup).try_into().unwrap();
        let seqnum = self.submit(0x00, data.len() as u32, setup, data);
        self.completion(seqnum)
    }
}

fn done(data: &[u8]) -> Completion {
    Completion { status: 0, data: data.to_vec(), unlinked: false }
}

fn failed(status: i32) -> Completion {
    Completion { status, data: vec![], unlinked: false }
}

// A guest's driver, and the card.
impl Vhci {
    /// A reader whose first slot has a card, configured.
    fn configured(layout: Layout) -> Self {
        let mut vhci = Self::new(layout);
        vhci.device.insert(SlotId(0), vhci.now);
        assert_eq!(vhci.control_out("00 09 0100 0000 0000", &[]), done(&[]));
        vhci.actions.clear();
        vhci
    }

    /// The same with the card powered and an interrupt transfer told of it.
    fn powered(layout: Layout) -> Self {
        let mut vhci = Self::configured(layout);
        let read = vhci.submit_in(BULK_IN, READ);
        vhci.submit_out(&unhex("62 00000000 00 00 000000"));
        vhci.settle();
        vhci.card_works();
        let answer = vhci.completion(read);
        assert_eq!(answer.data[..10], unhex("80 05000000 00 00 00 00 00"));
        vhci
    }

    /// XfrBlock for slot 0, with `apdu` as it is.
    fn xfr(&mut self, seq: u8, apdu: &[u8]) -> u32 {
        let mut message = vec![0x6F];
        message.extend_from_slice(&(apdu.len() as u32).to_le_bytes());
        message.extend_from_slice(&[0, seq, 0, 0, 0]);
        message.extend_from_slice(apdu);
        self.submit_out(&message)
    }

    /// The card does what it was told: its answers are the commands' data and 9000.
    fn card_works(&mut self) {
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::PowerOn { token, .. } => {
                    let atr = Atr::parse(&unhex("3B80800101")).unwrap();
                    self.device.complete(token, Outcome::Powered(atr), self.now);
                }
                Action::PowerOff { .. } => {}
                Action::Transmit { token, command, .. } => {
                    let response = Response::new(command.data(), StatusWord::SUCCESS);
                    self.device.complete(token, Outcome::Response(response), self.now);
                }
            }
        }
        self.input(Input::DeviceReady);
    }
}

/// An APDU to be echoed, and the DataBlock with its echo.
fn echo(seq: u8, data: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut apdu = vec![0, 0xCA, 0, 0, data.len() as u8];
    apdu.extend_from_slice(data);
    let mut answer = vec![0x80, data.len() as u8 + 2, 0, 0, 0, 0, seq, 0, 0, 0];
    answer.extend_from_slice(data);
    answer.extend_from_slice(&[0x90, 0]);
    (apdu, answer)
}

#[test]
fn a_kernel_enumerates_the_reader() {
    let mut vhci = Vhci::new(Layout::Slots(1));
    let device = vhci.control_in("80 06 0001 0000 4000", 64).data;
    assert_eq!(device.len(), 18);
    assert_eq!(device[8..12], unhex("e608 3344"));
    assert_eq!(vhci.control_in("80 06 0001 0000 1200", 18).data, device);
    let configuration = vhci.control_in("80 06 0002 0000 0900", 9).data;
    assert_eq!(configuration[..5], unhex("09 02 5d00 01"));
    assert_eq!(vhci.control_in("80 06 0002 0000 5d00", 93).data.len(), 93);
    assert_eq!(vhci.control_in("80 06 0003 0000 ff00", 255), done(&unhex("04 03 0904")));
    let product = vhci.control_in("80 06 0203 0904 ff00", 255).data;
    assert_eq!(product[0] as usize, product.len());
    assert_eq!(vhci.control_in("80 06 0903 0904 ff00", 255), failed(-32));
    assert_eq!(vhci.control_out("00 09 0100 0000 0000", &[]), done(&[]));
    assert_eq!(vhci.control_in("80 08 0000 0000 0100", 1), done(&[1]));
    assert_eq!(vhci.control_out("01 0b 0000 0000 0000", &[]), done(&[]));
    // A buffer shorter than wLength is not overrun.
    assert_eq!(vhci.control_in("80 06 0001 0000 1200", 8).data, device[..8]);
    assert_eq!((vhci.notices, vhci.closed), (vec![], None));
}

#[test]
fn the_qualifier_is_refused_at_full_speed() {
    let config = DeviceConfig { speed: Speed::Full, ..DeviceConfig::new("serial") };
    let mut vhci = Vhci::new(Layout::Slots(1));
    vhci.device = Device::new(config).unwrap();
    assert_eq!(vhci.control_in("80 06 0006 0000 0a00", 10), failed(-32));
}

#[test]
fn the_card_is_told_of_and_answers() {
    let mut vhci = Vhci::configured(Layout::Slots(1));
    let event = vhci.submit_in(INTERRUPT, 8);
    assert_eq!(vhci.completion(event), done(&unhex("50 03")));
    let event = vhci.submit_in(INTERRUPT, 8);
    vhci.settle();
    assert!(!vhci.completed.contains_key(&event));
    vhci.device.remove(SlotId(0), vhci.now);
    vhci.input(Input::DeviceReady);
    assert_eq!(vhci.completion(event), done(&unhex("50 02")));

    let mut vhci = Vhci::powered(Layout::Slots(1));
    let (apdu, answer) = echo(7, b"hello");
    let written = vhci.xfr(7, &apdu);
    assert_eq!(vhci.completion(written), done(&[]));
    // Whether the card or the guest's read comes first.
    let first = vhci.submit_in(BULK_IN, READ);
    vhci.settle();
    assert!(!vhci.completed.contains_key(&first));
    vhci.card_works();
    assert_eq!(vhci.completion(first), done(&answer));
    vhci.xfr(7, &apdu);
    vhci.settle();
    vhci.card_works();
    let second = vhci.submit_in(BULK_IN, READ);
    assert_eq!(vhci.completion(second), done(&answer));
}

#[test]
fn reads_are_answered_in_order() {
    let mut vhci = Vhci::powered(Layout::Slots(1));
    let reads = [0; 3].map(|_| vhci.submit_in(BULK_IN, READ));
    for (seq, read) in (0..).zip(reads) {
        let (apdu, answer) = echo(seq, &[seq; 3]);
        vhci.xfr(seq, &apdu);
        vhci.settle();
        assert!(!vhci.completed.contains_key(&read));
        vhci.card_works();
        assert_eq!(vhci.completion(read), done(&answer));
    }
}

#[test]
fn the_longest_messages_go_whole_or_in_pieces() {
    // 65 544 bytes: a header, Lc of three bytes, 65 535 bytes of data and Le of two.
    let mut apdu = unhex("00 ca 0000 00 ffff");
    apdu.extend((0..65_535u32).map(|at| at as u8));
    apdu.extend_from_slice(&[0, 0]);
    let mut message = vec![0x6F];
    message.extend_from_slice(&(apdu.len() as u32).to_le_bytes());
    message.extend_from_slice(&[0, 1, 0, 0, 0]);
    message.extend_from_slice(&apdu);
    let mut answer = unhex("80 01000100 00 01 00 00 00");
    answer.extend_from_slice(&apdu[7..7 + 65_535]);
    answer.extend_from_slice(&[0x90, 0]);

    let mut vhci = Vhci::powered(Layout::Slots(1));
    vhci.submit_out(&message);
    vhci.settle();
    vhci.card_works();
    let read = vhci.submit_in(BULK_IN, READ);
    assert_eq!(vhci.completion(read), done(&answer));
    // As libusb does on kernels without scatter and gather.
    let reads = [0; 5].map(|_| vhci.submit_in(BULK_IN, 16_384));
    let writes: Vec<u32> = message.chunks(16_384).map(|piece| vhci.submit_out(piece)).collect();
    vhci.settle();
    vhci.card_works();
    assert!(writes.into_iter().all(|write| vhci.completion(write) == done(&[])));
    let pieces: Vec<u8> = reads.into_iter().flat_map(|read| vhci.completion(read).data).collect();
    assert_eq!(pieces, answer);
}

#[test]
fn a_transfer_taken_back_costs_no_answer() {
    let mut vhci = Vhci::powered(Layout::Slots(1));
    let (apdu, answer) = echo(1, b"kept");
    vhci.xfr(1, &apdu);
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.unlink(read);
    assert_eq!(vhci.completion(read), Completion { status: -104, data: vec![], unlinked: true });
    vhci.card_works();
    vhci.deliver();
    let read = vhci.submit_in(BULK_IN, READ);
    assert_eq!(vhci.completion(read), done(&answer));
    assert_eq!(vhci.late, 0);
}

#[test]
fn an_unlink_that_crosses_the_answer_is_late() {
    let mut vhci = Vhci::powered(Layout::Slots(1));
    let (apdu, answer) = echo(1, b"crossing");
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.xfr(1, &apdu);
    vhci.settle();
    vhci.card_works();
    // The answer is on its way, and so is this.
    let unlink = vhci.unlink(read);
    vhci.receive(usize::MAX);
    assert_eq!(vhci.to_client.len(), HEADER + answer.len() + HEADER);
    vhci.deliver();
    assert_eq!(vhci.completed[&read], done(&answer));
    assert!(!vhci.unlinks.contains_key(&unlink));
    assert_eq!(vhci.late, 1);
    // Nothing comes twice.
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.settle();
    assert!(!vhci.completed.contains_key(&read));
    // What was never submitted, and what was taken back already.
    vhci.unlink(4711);
    vhci.unlink(read);
    vhci.unlink(read);
    vhci.settle();
    assert_eq!((vhci.late, vhci.closed), (3, None));
    // A command that has gone out cannot be taken back.
    let write = vhci.xfr(2, &apdu);
    vhci.unlink(write);
    assert_eq!(vhci.completion(write), done(&[]));
    assert_eq!(vhci.late, 4);
}

#[test]
fn the_middle_one_is_taken_back() {
    let mut vhci = Vhci::powered(Layout::Slots(1));
    let reads = [0; 3].map(|_| vhci.submit_in(BULK_IN, READ));
    vhci.unlink(reads[1]);
    for seq in 0..2 {
        vhci.xfr(seq, &echo(seq, &[seq]).0);
        vhci.settle();
        vhci.card_works();
    }
    assert_eq!(vhci.completion(reads[0]), done(&echo(0, &[0]).1));
    assert!(vhci.completion(reads[1]).unlinked);
    assert_eq!(vhci.completion(reads[2]), done(&echo(1, &[1]).1));
}

#[test]
fn a_detach_with_three_waiting_transfers() {
    let mut vhci = Vhci::powered(Layout::Slots(1));
    let event = vhci.submit_in(INTERRUPT, 8);
    assert_eq!(vhci.completion(event).data.len(), 2);
    let waiting = [(BULK_IN, READ), (BULK_IN, READ), (INTERRUPT, 8)].map(|(at, n)| vhci.submit_in(at, n));
    vhci.xfr(1, &echo(1, b"PIN").0);
    vhci.settle();
    for urb in waiting {
        vhci.unlink(urb);
    }
    vhci.settle();
    for urb in waiting {
        assert_eq!(vhci.completed[&urb], Completion { status: -104, data: vec![], unlinked: true });
    }
    assert!(vhci.submitted.is_empty());
    vhci.actions.clear();
    vhci.input(Input::Gone);
    // The card's session has ended; the answer of the old one goes nowhere.
    assert!(matches!(vhci.actions[..], [Action::PowerOff { slot: SlotId(0) }]), "{:?}", vhci.actions);
    assert_eq!(vhci.device.configuration(), 0);
    vhci.input(Input::Received(&[1; 100]));
    vhci.input(Input::DeviceReady);
    assert!(vhci.to_client.is_empty() && vhci.closed.is_none());
}

#[test]
fn to_be_configured_is_to_be_reset() {
    let mut vhci = Vhci::powered(Layout::Slots(1));
    vhci.xfr(1, &echo(1, b"before").0);
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.settle();
    assert!(matches!(vhci.actions[..], [Action::Transmit { .. }]));
    // What does not exist changes nothing.
    assert_eq!(vhci.control_out("00 09 0700 0000 0000", &[]), failed(-32));
    assert!(!vhci.completed.contains_key(&read));
    let transmit = vhci.actions.pop().unwrap();
    assert_eq!(vhci.control_out("00 09 0100 0000 0000", &[]), done(&[]));
    assert_eq!(vhci.completion(read), failed(-108));
    assert!(matches!(vhci.actions[..], [Action::PowerOff { .. }]), "{:?}", vhci.actions);
    vhci.actions = vec![transmit];
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.settle();
    vhci.card_works();
    vhci.settle();
    assert!(!vhci.completed.contains_key(&read), "an answer of the session before");
    vhci.submit_out(&unhex("65 00000000 00 02 000000"));
    // Present, but not powered.
    assert_eq!(vhci.completion(read), done(&unhex("81 00000000 00 02 01 00 00")));
}

#[test]
fn a_halted_endpoint_stalls_until_it_is_cleared() {
    let mut vhci = Vhci::configured(Layout::Slots(1));
    let reads = [0; 2].map(|_| vhci.submit_in(BULK_IN, READ));
    assert_eq!(vhci.control_out("02 03 0000 8100 0000", &[]), done(&[]));
    assert_eq!(reads.map(|read| vhci.completion(read)), [failed(-32), failed(-32)]);
    assert_eq!(vhci.control_out("02 01 0000 8100 0000", &[]), done(&[]));
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.settle();
    assert!(!vhci.completed.contains_key(&read));
    // Too short for any message.
    let write = vhci.submit_out(&[1, 2, 3]);
    assert_eq!(vhci.completion(write), failed(-32));
}

#[test]
fn an_event_is_not_cut_nor_lost() {
    let mut vhci = Vhci::configured(Layout::Slots(1));
    let event = vhci.submit_in(INTERRUPT, 1);
    assert_eq!(vhci.completion(event), failed(-75));
    let event = vhci.submit_in(INTERRUPT, 8);
    assert_eq!(vhci.completion(event), done(&unhex("50 03")));
}

#[test]
fn every_interface_has_its_endpoints() {
    let mut vhci = Vhci::new(Layout::Interfaces(7));
    assert_eq!(vhci.control_out("00 09 0100 0000 0000", &[]), done(&[]));
    let events: Vec<u32> = (1..=7).map(|n| vhci.submit_in(0x80 | (2 * n), 8)).collect();
    let reads: Vec<u32> = (0..7).map(|n| vhci.submit_in(0x81 + 2 * n, READ)).collect();
    vhci.settle();
    for slot in (0..7).rev() {
        vhci.device.insert(SlotId(slot), vhci.now);
        vhci.input(Input::DeviceReady);
        assert_eq!(vhci.completion(events[slot as usize]).data, unhex("50 03"));
    }
    for n in (0..7).rev() {
        vhci.submit(1 + 2 * n, 10, [0; 8], &unhex("65 00000000 00 05 000000"));
        assert_eq!(vhci.completion(reads[n as usize]), done(&unhex("81 00000000 00 05 01 00 00")));
    }
    assert_eq!(vhci.notices, []);
}

#[test]
fn what_makes_no_sense_is_answered_so() {
    let mut vhci = Vhci::configured(Layout::Slots(1));
    for address in [0x02, 0x83, 0x8F] {
        let urb = vhci.submit(address, 0, [0; 8], &[]);
        assert_eq!(vhci.completion(urb), failed(-71));
    }
    let urb = vhci.submit_in(BULK_IN, 0x8000_0000);
    assert_eq!(vhci.completion(urb), failed(-71));
    // IN by the setup packet, OUT by the header; and two lengths.
    assert_eq!(vhci.control_out("80 06 0001 0000 1200", &[0; 18]), failed(-71));
    assert_eq!(vhci.control_out("00 09 0100 0000 0000", &[0]), failed(-71));
    assert_eq!(vhci.control_in("21 01 0000 0000 0100", 1), failed(-71));
    vhci.devid = 0x0001_0003;
    let urb = vhci.submit(0x80, 18, unhex("80 06 0001 0000 1200").try_into().unwrap(), &[]);
    assert_eq!(vhci.completion(urb), failed(-19));
    let notices: Vec<String> = vhci.notices.iter().map(Notice::to_string).collect();
    assert_eq!(notices[0], "transfer 2 is for endpoint 2 OUT, which does not exist");
    assert_eq!(notices[3], "transfer_buffer_length at offset 0x18 of SUBMIT 5 is negative");
    assert_eq!(notices[7], "transfer 9 is for device 0x10003, which was not imported on this connection");
    assert_eq!((notices.len(), vhci.closed), (8, None));

    // What waits under the right number is taken back under a wrong one, too.
    vhci.devid = 0x0001_0002;
    let read = vhci.submit_in(BULK_IN, READ);
    vhci.devid = 7;
    vhci.unlink(read);
    assert!(vhci.completion(read).unlinked);
    // Endpoint 16 and up is not endpoint 0 and up.
    vhci.seqnum += 1;
    vhci.send_header([1, vhci.seqnum, 0x0001_0002, 1, 0x0001_0001, 0, 8, 0, 0, 0], [0; 8]);
    vhci.submitted.insert(vhci.seqnum, Submitted { is_in: true, length: 8 });
    assert_eq!(vhci.completion(vhci.seqnum), failed(-71));

    vhci.devid = 7;
    for _ in 0..60 {
        vhci.submit_in(BULK_IN, READ);
    }
    vhci.settle();
    assert_eq!(vhci.closed, Some(CloseReason::TooMuchNonsense));
}

#[test]
fn what_cannot_be_followed_ends_the_connection_and_the_session() {
    let closed = |bytes: &dyn Fn(&mut Vhci)| {
        let mut vhci = Vhci::powered(Layout::Slots(1));
        vhci.submit_in(BULK_IN, READ);
        bytes(&mut vhci);
        vhci.actions.clear();
        vhci.receive(usize::MAX);
        vhci.deliver();
        assert!(matches!(vhci.actions[..], [Action::PowerOff { .. }]), "{:?}", vhci.actions);
        assert_eq!(vhci.device.configuration(), 0);
        vhci.input(Input::Received(&[0; 48]));
        vhci.input(Input::Gone);
        vhci.closed.unwrap()
    };
    let reason = closed(&|vhci| vhci.to_server.extend_from_slice(&[0xFF; HEADER]));
    assert_eq!(
        reason.to_string(),
        "cannot follow the client: command at offset 0x00 is 0xffffffff, neither SUBMIT nor UNLINK"
    );
    let seqnum = 5;
    let length = MAX_TRANSFER as u32 + 1;
    assert_eq!(
        closed(&|vhci| {
            vhci.submit(BULK_OUT, length, [0; 8], &[]);
        }),
        CloseReason::Decode(DecodeError::TooLong { seqnum, length })
    );
    assert_eq!(
        closed(&|vhci| vhci.send_header([1, 5, vhci.devid, 1, 1, 0, 64, 0, 1, 1], [0; 8])),
        CloseReason::Decode(DecodeError::Isochronous { seqnum, packets: 1 })
    );
    assert_eq!(
        closed(&|vhci| vhci.send_header([1, 4, vhci.devid, 1, 1, 0, 64, 0, 0, 1], [0; 8])),
        CloseReason::DuplicateSeqnum(4)
    );
    assert_eq!(
        closed(&|vhci| vhci.send_header([2, 4, vhci.devid, 0, 0, 4, 0, 0, 0, 0], [0; 8])),
        CloseReason::DuplicateSeqnum(4)
    );
    assert_eq!(
        closed(&|vhci| {
            for _ in 0..64 {
                vhci.submit_in(BULK_IN, READ);
            }
        }),
        CloseReason::TooManyWaiting(1)
    );
}

#[test]
fn a_client_that_does_not_read_is_not_served_on() {
    let mut vhci = Vhci::new(Layout::Interfaces(7));
    let setup = unhex("80 06 0002 0000 ff0f").try_into().unwrap();
    for _ in 0..20_000 {
        vhci.submit(0x80, 4095, setup, &[]);
    }
    vhci.receive(usize::MAX);
    assert_eq!(vhci.closed, Some(CloseReason::TooMuchUnread));
    assert!(vhci.to_client.len() < (8 << 20) + 700);
}

// ---- anything ---------------------------------------------------------------------------------------------

#[derive(Clone, Debug)]
enum Step {
    Read(u32),
    Event(u32),
    Status,
    Exchange(u8),
    PowerOn,
    Control([u8; 8], u32),
    Unlink(prop::sample::Index),
    Receive(usize),
    Deliver,
    CardWorks,
    CardIn(bool),
    Second,
}

fn any_step() -> impl Strategy<Value = Step> {
    // GET_DESCRIPTOR, SET_CONFIGURATION 1 and 0, SET_INTERFACE, SET_ and CLEAR_FEATURE(ENDPOINT_HALT), ABORT.
    let controls = [
        ("80 06 0002 0000 ff00", 255),
        ("00 09 0100 0000 0000", 0),
        ("00 09 0000 0000 0000", 0),
        ("01 0b 0000 0000 0000", 0),
        ("02 03 0000 8100 0000", 0),
        ("02 01 0000 8100 0000", 0),
        ("02 01 0000 0100 0000", 0),
        ("21 01 0001 0000 0000", 0),
    ]
    .map(|(setup, length)| Step::Control(unhex(setup).try_into().unwrap(), length));
    prop_oneof![
        4 => prop_oneof![Just(READ), 0u32..600].prop_map(Step::Read),
        2 => (0u32..9).prop_map(Step::Event),
        2 => Just(Step::Status),
        4 => any::<u8>().prop_map(Step::Exchange),
        2 => Just(Step::PowerOn),
        2 => prop::sample::select(controls.to_vec()),
        6 => any::<prop::sample::Index>().prop_map(Step::Unlink),
        6 => (0usize..200).prop_map(Step::Receive),
        3 => Just(Step::Deliver),
        4 => Just(Step::CardWorks),
        1 => any::<bool>().prop_map(Step::CardIn),
        1 => Just(Step::Second),
    ]
}

impl Vhci {
    fn step(&mut self, step: &Step) {
        match step {
            Step::Read(length) => {
                self.submit_in(BULK_IN, *length);
            }
            Step::Event(length) => {
                self.submit_in(INTERRUPT, *length);
            }
            Step::Status => {
                self.submit_out(&unhex("65 00000000 00 03 000000"));
            }
            Step::Exchange(seq) => {
                self.xfr(*seq, &echo(*seq, &[*seq; 9]).0);
            }
            Step::PowerOn => {
                self.submit_out(&unhex("62 00000000 00 04 000000"));
            }
            Step::Control(setup, length) => {
                self.submit(setup[0] & 0x80, *length, *setup, &[]);
            }
            Step::Unlink(_) if self.seqnum == 0 => {}
            Step::Unlink(which) => {
                // Of a SUBMIT, waiting or answered, or of an UNLINK.
                self.unlink(which.index(self.seqnum as usize) as u32 + 1);
            }
            Step::Receive(count) => self.receive(*count),
            Step::Deliver => self.deliver(),
            Step::CardWorks => self.card_works(),
            Step::CardIn(true) => self.device.insert(SlotId(0), self.now),
            Step::CardIn(false) => self.device.remove(SlotId(0), self.now),
            Step::Second => {
                self.now += Duration::from_secs(1);
                self.device.handle_deadline(self.now);
                self.input(Input::DeviceReady);
            }
        }
    }
}

proptest! {
    #[test]
    fn every_transfer_is_completed_once(steps in prop::collection::vec(any_step(), 0..60)) {
        let mut vhci = Vhci::configured(Layout::Slots(1));
        for step in &steps {
            // The model panics at what the kernel would not bear.
            vhci.step(step);
        }
        vhci.settle();
        prop_assert!(vhci.unlinks.is_empty());
        let left: Vec<u32> = vhci.submitted.keys().copied().collect();
        for urb in left {
            vhci.unlink(urb);
        }
        vhci.settle();
        prop_assert!(vhci.submitted.is_empty() && vhci.unlinks.is_empty());
        prop_assert_eq!((vhci.notices, vhci.closed), (vec![], None));
    }

    #[test]
    fn no_answer_is_lost_or_doubled_by_taking_transfers_back(
        steps in prop::collection::vec(
            prop_oneof![
                Just(Step::Read(READ)),
                Just(Step::Status),
                any::<prop::sample::Index>().prop_map(Step::Unlink),
                (0usize..200).prop_map(Step::Receive),
                Just(Step::Deliver),
            ],
            0..60,
        ),
    ) {
        let mut vhci = Vhci::configured(Layout::Slots(1));
        let mut asked = 0;
        for step in &steps {
            if matches!(step, Step::Status) {
                asked += 1;
                vhci.submit_out(&[0x65, 0, 0, 0, 0, 0, asked, 0, 0, 0]);
            } else {
                vhci.step(step);
            }
        }
        for _ in 0..asked {
            vhci.submit_in(BULK_IN, READ);
            vhci.settle();
        }
        prop_assert_eq!(vhci.closed, None);
        let mut read: Vec<(u32, u8)> = vhci
            .completed
            .iter()
            .filter(|(_, completion)| completion.data.len() == 10)
            .map(|(seqnum, completion)| (*seqnum, completion.data[6]))
            .collect();
        read.sort_unstable();
        let sequence: Vec<u8> = read.into_iter().map(|(_, sequence)| sequence).collect();
        prop_assert_eq!(sequence, (1..=asked).collect::<Vec<u8>>());
    }

    #[test]
    fn any_bytes_are_borne(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..8)) {
        let mut vhci = Vhci::powered(Layout::Slots(1));
        let mut connection = Management::new(vhci.now);
        let exports = exports();
        for piece in &pieces {
            vhci.input(Input::Received(piece));
            connection.handle(&mut &piece[..], &exports, vhci.now);
        }
        while connection.poll_output().is_some() {}
    }

    #[test]
    fn any_commands_are_borne_within_bounds(
        commands in prop::collection::vec(
            (
                prop_oneof![9 => 1u32..3, 1 => 0u32..6],
                0u32..400,
                prop_oneof![9 => Just(0x0001_0002), 1 => any::<u32>()],
                prop_oneof![20 => 0u32..2, 1 => 0u32..4],
                prop_oneof![9 => 0u32..4, 1 => any::<u32>()],
                prop_oneof![4 => 0u32..80, 1 => Just(u32::MAX)],
                prop_oneof![20 => Just(0), 1 => Just(u32::MAX), 1 => any::<u32>()],
                any::<[u8; 8]>(),
                prop::collection::vec(any::<u8>(), 80),
            ),
            0..60,
        ),
        cut in 1usize..500,
    ) {
        let mut vhci = Vhci::powered(Layout::Slots(2));
        let mut wire = Vec::new();
        for (command, seqnum, devid, direction, endpoint, length, packets, setup, data) in &commands {
            let words = [*command, *seqnum, *devid, *direction, *endpoint, *seqnum, *length, 0, *packets, 0];
            vhci.to_server.clear();
            vhci.send_header(words, *setup);
            wire.append(&mut vhci.to_server);
            if (*command, *direction) == (1, 0) && *length != u32::MAX {
                wire.extend_from_slice(&data[..*length as usize]);
            }
        }
        for piece in wire.chunks(cut) {
            vhci.input(Input::Received(piece));
            vhci.card_works();
        }
        // Replies to known commands are as long as what was asked for, and nothing else is sent.
        prop_assert!(vhci.to_client.len() <= commands.len() * (HEADER + 700));
        prop_assert!(vhci.notices.len() <= 65);
        vhci.input(Input::Gone);
        prop_assert_eq!(vhci.device.configuration(), 0);
    }
}
