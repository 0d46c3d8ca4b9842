//! Runs inside the test guest and speaks CCID to a reader through usbfs, as no driver would. pcscd must not run.
//!
//! Steps are words after each other. What comes in is printed as hexadecimal, a line each; a failure exits 1.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nusb::MaybeFuture;
use nusb::descriptors::TransferType;
use nusb::transfer::{Buffer, Bulk, ControlOut, ControlType, Direction, In, Out, Recipient, TransferError};
use nusb::{Endpoint, Interface};

const USAGE: &str = "\
usage: guest-usb SERIAL STEP...
       out HEX         sends a message on the bulk-OUT pipe
       in SECONDS      one message from the bulk-IN pipe
       answer SECONDS  the same, but time extensions are only counted
       silence SECONDS nothing comes from the bulk-IN pipe
       abort SLOT SEQ  the control request ABORT
";

/// Smart card, the interface's class.
const CLASS: u8 = 0x0B;
/// Longest message in whole packets of either speed.
const LONGEST: usize = (65_554_usize).next_multiple_of(512);
/// For transfers the reader takes at once.
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let mut words = args.iter().map(String::as_str);
    let mut reader = Reader::open(words.next().context(USAGE)?)?;
    while let Some(step) = words.next() {
        let mut value = || words.next().with_context(|| format!("{step} needs a value\n{USAGE}"));
        match step {
            "out" => reader.send(unhex(value()?)?)?,
            "in" => {
                let message = reader.receive(seconds(value()?)?)?.context("nothing came")?;
                println!("in {}", hex(&message));
            }
            "answer" => {
                let (message, extensions) = reader.answer(seconds(value()?)?)?;
                println!("answer {} extensions={extensions}", hex(&message));
            }
            "silence" => {
                if let Some(message) = reader.receive(seconds(value()?)?)? {
                    bail!("{} came", hex(&message));
                }
            }
            "abort" => {
                let [slot, seq]: [u8; 2] = [value()?.parse()?, value()?.parse()?];
                reader.abort(slot, seq)?;
            }
            _ => bail!("no step {step}\n{USAGE}"),
        }
    }
    Ok(())
}

struct Reader {
    interface: Interface,
    bulk_in: Endpoint<Bulk, In>,
    bulk_out: Endpoint<Bulk, Out>,
}

impl Reader {
    /// Claims the first CCID interface of the device with this serial number.
    fn open(serial: &str) -> Result<Self> {
        let found = nusb::list_devices().wait()?.find(|device| device.serial_number() == Some(serial));
        let info = found.with_context(|| format!("no device with serial number {serial}"))?;
        let number = info.interfaces().find(|interface| interface.class() == CLASS).context("no reader")?;
        let number = number.interface_number();
        let device = info.open().wait().context("opening the device")?;
        let interface = device.claim_interface(number).wait().context("claiming the interface")?;
        let address = |direction| {
            let descriptor = interface.descriptor().context("no descriptor")?;
            let mut endpoints = descriptor.endpoints();
            let of = endpoints.find(|endpoint| {
                endpoint.transfer_type() == TransferType::Bulk && endpoint.direction() == direction
            });
            anyhow::Ok(of.context("no bulk endpoint")?.address())
        };
        let bulk_in = interface.endpoint(address(Direction::In)?)?;
        let bulk_out = interface.endpoint(address(Direction::Out)?)?;
        Ok(Self { interface, bulk_in, bulk_out })
    }

    fn send(&mut self, message: Vec<u8>) -> Result<()> {
        let length = message.len();
        let done = self.bulk_out.transfer_blocking(message.into(), LIMIT);
        done.status.context("bulk-OUT")?;
        ensure!(done.actual_len == length, "{} of {length} bytes were taken", done.actual_len);
        Ok(())
    }

    /// What comes before the time is over.
    fn receive(&mut self, limit: Duration) -> Result<Option<Vec<u8>>> {
        let done = self.bulk_in.transfer_blocking(Buffer::new(LONGEST), limit);
        match done.status {
            Ok(()) => Ok(Some(done.into_result()?.into_vec())),
            Err(TransferError::Cancelled) => Ok(None),
            Err(error) => Err(error).context("bulk-IN"),
        }
    }

    fn answer(&mut self, limit: Duration) -> Result<(Vec<u8>, usize)> {
        let start = Instant::now();
        let mut extensions = 0;
        loop {
            let left = limit.checked_sub(start.elapsed()).context("no answer in time")?;
            let message = self.receive(left)?.context("no answer in time")?;
            // bmCommandStatus 2 (USB CCID 1.1 §6.2.6)
            if message.get(7).is_none_or(|status| status >> 6 != 2) {
                return Ok((message, extensions));
            }
            extensions += 1;
        }
    }

    /// USB CCID 1.1 §5.3.1.
    fn abort(&self, slot: u8, seq: u8) -> Result<()> {
        let request = ControlOut {
            control_type: ControlType::Class,
            recipient: Recipient::Interface,
            request: 0x01,
            value: u16::from_le_bytes([slot, seq]),
            index: self.interface.interface_number().into(),
            data: &[],
        };
        self.interface.control_out(request, LIMIT).wait().context("ABORT")
    }
}

fn seconds(text: &str) -> Result<Duration> {
    Ok(Duration::from_secs(text.parse().with_context(|| format!("{text} seconds"))?))
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    ensure!(text.len() % 2 == 0 && text.is_ascii(), "{text} is not hexadecimal");
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).with_context(|| text.to_owned());
    (0..text.len()).step_by(2).map(byte).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}
