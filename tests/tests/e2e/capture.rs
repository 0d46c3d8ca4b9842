//! What Wireshark makes of the reader's traffic, as QEMU itself recorded it.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use stack_tests::database::{Database, PIN};
use stack_tests::guest::{Boot, Guest, within};
use stack_tests::process::Process;
use stack_tests::reader::{Bus, Place, certificates};
use tokio::process::Command;

/// `tshark`'s columns, one [`Record`] a line.
const FIELDS: [&str; 9] = [
    "frame.number",
    "usb.bus_id",
    "usb.device_address",
    "usb.transfer_type",
    "usb.endpoint_address",
    "usb.urb_type",
    "frame.cap_len",
    "frame.protocols",
    "_ws.malformed",
];
/// What stands before the data in each record (LINKTYPE_USB_LINUX_MMAPPED). `usb.data_len` cannot be asked instead:
/// QEMU counts this in, so that records without data claim to have 64 bytes.
const PSEUDO_HEADER: u32 = 64;
/// `usb.transfer_type` (Linux' usbmon).
const INTERRUPT: u32 = 1;
const BULK: u32 = 3;

/// A record of the capture, as dissected.
struct Record {
    number: u32,
    /// Bus and address as `usb.device` has them.
    device: u32,
    transfer_type: u32,
    endpoint: u32,
    is_completion: bool,
    data_length: u32,
    is_ccid: bool,
    is_malformed: bool,
}

impl Record {
    fn parse(line: &str) -> Result<Self> {
        let columns: Vec<&str> = line.split('\t').collect();
        let [number, bus, address, transfer, endpoint, urb_type, length, protocols, malformed] = columns[..]
        else {
            anyhow::bail!("{} columns from tshark: {line}", columns.len());
        };
        Ok(Self {
            number: value(number)?,
            device: value(bus)? << 16 | value(address)?,
            transfer_type: value(transfer)?,
            endpoint: value(endpoint)?,
            is_completion: urb_type.contains('C'),
            data_length: value(length)?.saturating_sub(PSEUDO_HEADER),
            is_ccid: protocols.split(':').any(|protocol| protocol == "usbccid"),
            is_malformed: !malformed.is_empty() || protocols.contains("_ws.malformed"),
        })
    }

    /// Whether there is a CCID message, or a notification, in it.
    fn carries_message(&self) -> bool {
        matches!(self.transfer_type, BULK | INTERRUPT) && self.data_length > 0
    }

    fn is_in(&self) -> bool {
        self.endpoint & 0x80 != 0
    }

    fn shown(&self) -> String {
        let Self { number, transfer_type, endpoint, data_length, .. } = self;
        format!(
            "record {number}: transfer type {transfer_type}, endpoint {endpoint:#04x}, {data_length} bytes"
        )
    }
}

fn value(text: &str) -> Result<u32> {
    let value = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    value.with_context(|| format!("{text:?} from tshark is no number"))
}

/// Every record, with the device's traffic dissected as CCID.
async fn dissect(file: &Path, device: u32) -> Result<Vec<Record>> {
    let mut tshark = Command::new("tshark");
    // Neither a user's preferences nor names looked up.
    tshark.arg("-n").arg("-r").arg(file).arg("-d").arg(format!("usb.device=={device:#x},usbccid"));
    tshark.args(["-T", "fields", "-E", "separator=/t"]);
    tshark.args(FIELDS.iter().flat_map(|field| ["-e", field]));
    let output = within(None, Duration::from_secs(60), "tshark", tshark.output()).await?;
    let output = output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow!("there is no tshark; it is in Debian's package tshark"),
        _ => anyhow!("tshark: {error}"),
    })?;
    ensure!(output.status.success(), "tshark: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(Record::parse).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn wireshark_understands_every_message() -> Result<()> {
    let (place, database, state) = (Place::new(Bus::Xhci)?, Database::with_password()?, tempfile::tempdir()?);
    let capture = state.path().join("reader.pcap");
    let args = ["--reader", &place.reader(""), "--card", &certificates(&database, "")].map(str::to_owned);
    let daemon = Process::start("ccid-device", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])?;
    daemon.line("ready").await?;
    let mut qemu = place.qemu();
    let redir = qemu.iter_mut().find(|arg| arg.starts_with("usb-redir,")).context("a usb-redir device")?;
    redir.push_str(&format!(",pcap={}", capture.display().to_string().replace(',', ",,")));
    let guest = Guest::boot(Boot::with(qemu)).await?;
    guest.start_pcscd().await?;
    guest.ok("guest-pcsc wait-reader 30").await?;
    guest.ok("guest-pcsc wait-card present 30").await?;
    guest.ok("opensc-tool -n").await?;
    let test = guest.ok(&format!("pkcs11-tool --test --login --pin {PIN}")).await?;
    ensure!(test.trim_end().ends_with("No errors"), "{test}");
    // Its file is whole once QEMU has ended in order.
    guest.shutdown().await;

    // An xHCI gives its devices addresses of their own choice, so the one that talks most is looked for first.
    let records = dissect(&capture, 1).await?;
    let talker = records.iter().rfind(|record| record.carries_message()).context("no message at all")?.device;
    let records = dissect(&capture, talker).await?;

    let messages: Vec<&Record> = records.iter().filter(|record| record.carries_message()).collect();
    let count = |transfer_type, is_in| {
        let of = |record: &&&Record| record.transfer_type == transfer_type && record.is_in() == is_in;
        messages.iter().filter(of).count()
    };
    let (commands, answers, notifications) = (count(BULK, false), count(BULK, true), count(INTERRUPT, true));
    let dissected = records.iter().filter(|record| record.is_ccid).count();
    println!(
        "{} records of device {talker:#x}: {commands} commands, {answers} answers, {notifications} notifications; \
         {dissected} dissected as USBCCID",
        records.len()
    );
    ensure!(commands > 50 && answers >= commands && notifications > 0, "this is no use of a card");
    ensure!(dissected == messages.len(), "{dissected} USBCCID frames for {} messages", messages.len());
    let none_of = |what: &str, bad: &dyn Fn(&Record) -> bool, among: &[&Record]| {
        let bad: Vec<String> =
            among.iter().filter(|record| bad(record)).map(|record| record.shown()).collect();
        ensure!(bad.is_empty(), "{} {what}, first {:#?}", bad.len(), &bad[..bad.len().min(5)]);
        Ok(())
    };
    // What goes out is there when it is submitted, what comes in when it is complete.
    none_of("in the wrong half", &|record| record.is_in() != record.is_completion, &messages)?;
    none_of("not dissected as USBCCID", &|record| !record.is_ccid, &messages)?;
    let all: Vec<&Record> = records.iter().collect();
    none_of("malformed", &|record| record.is_malformed, &all)
}
